// Atomics. In between, other threads may run: algorithms without locks are met in many orders.
#pragma once

#include <concepts>
#include <type_traits>

namespace simt {

// Lets others go first, once in four times.
void maybe_yield();

// Replaces *address by next(*address) and returns what was there.
template <class T, class Next>
T atomically(T* address, Next next) {
  maybe_yield();
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = next(before);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

template <class T, class... Types>
concept OneOf = (std::same_as<T, Types> || ...);
template <class T>
concept Word = OneOf<T, int, unsigned, unsigned long long>;

}  // namespace simt

// The value's type is the address's, as among CUDA's overloads.
template <class T>
  requires simt::Word<T> || simt::OneOf<T, float, double>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::atomically(address, [=](T before) { return before + value; });
}

template <class T>
  requires simt::OneOf<T, int, unsigned>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return simt::atomically(address, [=](T before) { return before - value; });
}

template <class T>
  requires simt::Word<T> || simt::OneOf<T, long long>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return simt::atomically(address, [=](T before) { return value < before ? value : before; });
}

template <class T>
  requires simt::Word<T> || simt::OneOf<T, long long>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::atomically(address, [=](T before) { return before < value ? value : before; });
}

template <simt::Word T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return simt::atomically(address, [=](T before) { return before & value; });
}

template <simt::Word T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return simt::atomically(address, [=](T before) { return before | value; });
}

template <simt::Word T>
T atomicXor(T* address, std::type_identity_t<T> value) {
  return simt::atomically(address, [=](T before) { return before ^ value; });
}

template <class T>
  requires simt::Word<T> || simt::OneOf<T, float>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt::atomically(address, [=](T) { return value; });
}

template <class T>
  requires simt::Word<T> || simt::OneOf<T, unsigned short>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return simt::atomically(address, [=](T before) { return before == expected ? value : before; });
}

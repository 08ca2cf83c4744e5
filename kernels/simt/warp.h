// Warp intrinsics: all lanes of the mask must be there and call the same one. __syncwarp alone orders memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "place.h"

namespace simt {

enum class Shuffle { kIndex, kUp, kDown, kXor };

// Bits that the lane brought which `by` means, as CUDA defines it for groups of `width` lanes.
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int by, int width, const Site& site);
// Lanes of the mask whose predicate holds.
unsigned ballot(const char* name, unsigned mask, bool predicate, const Site& site);
// Lanes of the mask that brought the same bits.
unsigned match(unsigned mask, uint64_t bits, const Site& site);
// The lanes of the mask wait for one another.
void sync_warp(unsigned mask, const Site& site);

template <class T>
concept Shuffled = (std::is_arithmetic_v<T> || requires { typename T::Shuffled; }) &&
                   (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);

template <Shuffled T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int by, int width, const Site& site) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, by, width, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

inline void __syncwarp(unsigned mask = 0xffffffffU, simt::Site site = simt::Site::current()) {
  simt::sync_warp(mask, site);
}

template <simt::Shuffled T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, simt::Site site = simt::Site::current()) {
  return simt::shuffle_value(simt::Shuffle::kIndex, mask, value, lane, width, site);
}

template <simt::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::current()) {
  return simt::shuffle_value(simt::Shuffle::kUp, mask, value, static_cast<int>(delta), width, site);
}

template <simt::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::current()) {
  return simt::shuffle_value(simt::Shuffle::kDown, mask, value, static_cast<int>(delta), width, site);
}

template <simt::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, simt::Site site = simt::Site::current()) {
  return simt::shuffle_value(simt::Shuffle::kXor, mask, value, lanes, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::ballot("__ballot_sync", mask, predicate != 0, site);
}

inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::ballot("__any_sync", mask, predicate != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  return simt::ballot("__all_sync", mask, predicate != 0, site) == mask;
}

template <class T>
  requires std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8)
unsigned __match_any_sync(unsigned mask, T value, simt::Site site = simt::Site::current()) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return simt::match(mask, bits, site);
}

// Which lanes happen to run together is nothing to build on: pass the mask that the algorithm means.
unsigned __activemask() = delete;

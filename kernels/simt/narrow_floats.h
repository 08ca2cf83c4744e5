// What float16 and bfloat16 have in common: arithmetic in float, rounded to nearest even after every operation.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace simt {

// Bits of the nearest value with so many bits of mantissa and such an exponent bias; halves go to even.
template <int mantissa, int bias>
uint16_t narrow(double value) {
  constexpr int kInfinity = (2 * bias + 1) << mantissa;
  const int sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7FFF;
  if (std::isinf(value)) return static_cast<uint16_t>(sign | kInfinity);
  int exponent;
  std::frexp(value, &exponent);  // |value| < 2^exponent
  exponent = value == 0 || exponent - 1 < 1 - bias ? 1 - bias : exponent - 1;
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(value), mantissa - exponent)));
  // A normal number's leading bit, in `steps`, adds one to the exponent; so does rounding up to a power of two.
  const int bits = exponent > bias ? kInfinity : ((exponent + bias - 1) << mantissa) + steps;
  return static_cast<uint16_t>(sign | (bits < kInfinity ? bits : kInfinity));
}

template <int mantissa, int bias>
float widen(uint16_t bits) {
  const int exponent = bits >> mantissa & (2 * bias + 1), steps = bits & ((1 << mantissa) - 1);
  float magnitude;
  if (exponent == 2 * bias + 1)
    magnitude = steps == 0 ? INFINITY : NAN;
  else if (exponent == 0)
    magnitude = std::ldexp(static_cast<float>(steps), 1 - bias - mantissa);
  else
    magnitude = std::ldexp(static_cast<float>(steps | 1 << mantissa), exponent - bias - mantissa);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// a * b + c with its last bit odd where it is not exact: rounding it again to a narrow type, more than two bits
// shorter, then gives what rounding the exact result would. The product of two narrow values is exact in double.
inline double fused(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  const double of_c = sum - product, error = (product - (sum - of_c)) + (c - of_c);
  const bool even = (std::bit_cast<uint64_t>(sum) & 1) == 0;
  if (!std::isfinite(sum) || error == 0 || !even) return sum;
  return std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

// A number of 16 bits; the names of CUDA's two types are instances.
template <int mantissa, int bias>
struct alignas(2) Narrow {
  using Shuffled = void;  // may travel between lanes
  uint16_t bits;

  Narrow() = default;
  template <class T>
    requires std::is_arithmetic_v<T>
  Narrow(T value) : bits(narrow<mantissa, bias>(static_cast<double>(value))) {}
  operator float() const { return widen<mantissa, bias>(bits); }

  static Narrow of_bits(uint16_t bits) {
    Narrow value;
    value.bits = bits;
    return value;
  }

  friend Narrow operator+(Narrow a, Narrow b) { return float(a) + float(b); }
  friend Narrow operator-(Narrow a, Narrow b) { return float(a) - float(b); }
  friend Narrow operator*(Narrow a, Narrow b) { return float(a) * float(b); }
  friend Narrow operator/(Narrow a, Narrow b) { return float(a) / float(b); }
  friend Narrow operator-(Narrow a) { return of_bits(a.bits ^ 0x8000); }
  friend bool operator==(Narrow a, Narrow b) { return float(a) == float(b); }
  friend bool operator!=(Narrow a, Narrow b) { return float(a) != float(b); }
  friend bool operator<(Narrow a, Narrow b) { return float(a) < float(b); }
  friend bool operator>(Narrow a, Narrow b) { return float(a) > float(b); }
  friend bool operator<=(Narrow a, Narrow b) { return float(a) <= float(b); }
  friend bool operator>=(Narrow a, Narrow b) { return float(a) >= float(b); }
};

// Two of them in one aligned word.
template <class T>
struct alignas(4) Pair {
  using Shuffled = void;
  T x, y;

  friend Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
  friend Pair operator-(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }
  friend Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
  friend Pair operator/(Pair a, Pair b) { return {a.x / b.x, a.y / b.y}; }
};

template <class T>
T fused(T a, T b, T c) {
  return T(fused(double(float(a)), double(float(b)), double(float(c))));
}

template <class T>
Pair<T> fused(Pair<T> a, Pair<T> b, Pair<T> c) {
  return {fused(a.x, b.x, c.x), fused(a.y, b.y, c.y)};
}

template <class T>
T smaller(T a, T b) {
  return T(std::fmin(float(a), float(b)));
}

template <class T>
T larger(T a, T b) {
  return T(std::fmax(float(a), float(b)));
}

}  // namespace simt

// Arithmetic that both types have under the same names.
#define SIMT_NARROW_ARITHMETIC(one, two)                                            \
  inline one __hadd(one a, one b) { return a + b; }                                 \
  inline one __hsub(one a, one b) { return a - b; }                                 \
  inline one __hmul(one a, one b) { return a * b; }                                 \
  inline one __hdiv(one a, one b) { return a / b; }                                 \
  inline one __hneg(one a) { return -a; }                                           \
  inline one __habs(one a) { return one::of_bits(a.bits & 0x7FFF); }                \
  inline one __hfma(one a, one b, one c) { return simt::fused(a, b, c); }           \
  inline one __hmin(one a, one b) { return simt::smaller(a, b); }                   \
  inline one __hmax(one a, one b) { return simt::larger(a, b); }                    \
  inline bool __hisnan(one a) { return std::isnan(float(a)); }                      \
  inline two __hadd2(two a, two b) { return a + b; }                                \
  inline two __hsub2(two a, two b) { return a - b; }                                \
  inline two __hmul2(two a, two b) { return a * b; }                                \
  inline two __h2div(two a, two b) { return a / b; }                                \
  inline two __hfma2(two a, two b, two c) { return simt::fused(a, b, c); }          \
  inline two __hmin2(two a, two b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; } \
  inline two __hmax2(two a, two b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }

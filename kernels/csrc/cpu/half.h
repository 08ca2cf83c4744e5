// float16 and bfloat16 as bits, for a C interface without torch: widening is exact, narrowing rounds half to even.
// Without branches and without float subnormals, so that loops vectorise and flush-to-zero changes nothing.
#pragma once

#include <cstdint>
#include <cstring>

namespace scaphoid {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Written with masks: compilers turn `?:` around float arithmetic into branches.
inline uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  const uint32_t mask = 0U - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

// float16 has 10 bits of mantissa (13 fewer than float32) and exponents of bias 15 (112 less).
inline float load(Half half) {
  const uint32_t magnitude = half.bits & 0x7FFFU, sign = (half.bits & 0x8000U) << 16;
  const uint32_t normal = (magnitude << 13) + (112U << 23);
  // A subnormal is mantissa * 2^-24: written behind the leading one of 2^-14, which is then taken away.
  const uint32_t subnormal = bits_of(float_of((magnitude << 13) + (113U << 23)) - float_of(113U << 23));
  const uint32_t special = (magnitude << 13) | 0x7F800000U;
  return float_of(sign | select(magnitude < 0x0400U, subnormal, select(magnitude < 0x7C00U, normal, special)));
}

inline void store(float value, Half* out) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000U, magnitude = bits & 0x7FFFFFFFU;
  const uint32_t normal = (magnitude - (112U << 23) + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;  // carries to infinity
  // Beside 0.5, float32 has steps of 2^-24, those of subnormal halves: the addition rounds.
  const uint32_t tiny = select(magnitude < (113U << 23), magnitude, 0U);
  const uint32_t subnormal = bits_of(float_of(tiny) + 0.5F) - bits_of(0.5F);
  const uint32_t special = magnitude > 0x7F800000U ? 0x7E00U : 0x7C00U;
  const uint32_t finite = select(magnitude < (113U << 23), subnormal, normal);
  out->bits = static_cast<uint16_t>(sign | select(magnitude < (143U << 23), finite, special));
}

inline float load(BFloat16 half) { return float_of(static_cast<uint32_t>(half.bits) << 16); }

inline void store(float value, BFloat16* out) {
  const uint32_t bits = bits_of(value), rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? 0x7FC0U : rounded);
}

}  // namespace scaphoid

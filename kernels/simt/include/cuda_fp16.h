// Stands in for CUDA's header: float16.
#pragma once

#include "../narrow_floats.h"
#include "cuda_runtime.h"

using __half = simt::Narrow<10, 15>;
using __half2 = simt::Pair<__half>;
using half = __half;
using half2 = __half2;
SIMT_NARROW_ARITHMETIC(__half, __half2)

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __half __double2half(double value) { return value; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return __half::of_bits(bits); }
inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
inline __half2 __float22half2_rn(float2 value) { return {value.x, value.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half value) { return {value, value}; }
inline __half2 __float2half2_rn(float value) { return {value, value}; }
inline __half __low2half(__half2 value) { return value.x; }
inline __half __high2half(__half2 value) { return value.y; }
inline float __low2float(__half2 value) { return value.x; }
inline float __high2float(__half2 value) { return value.y; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }

inline __half atomicAdd(__half* address, __half value) {
  return __half::of_bits(
      simt::atomically(&address->bits, [=](uint16_t before) { return (__half::of_bits(before) + value).bits; }));
}

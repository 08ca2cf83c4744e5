// Where a thread is: in its block, in the grid, in the source.
#pragma once

#include <source_location>

#include "vectors.h"

namespace simt {

using Site = std::source_location;  // where in the kernel something is called

struct Place {
  uint3 thread{}, block{};
  dim3 block_size, grid_size;
};
extern Place place;  // of the thread that runs now

}  // namespace simt

inline const uint3& threadIdx = simt::place.thread;
inline const uint3& blockIdx = simt::place.block;
inline const dim3& blockDim = simt::place.block_size;
inline const dim3& gridDim = simt::place.grid_size;
constexpr int warpSize = 32;

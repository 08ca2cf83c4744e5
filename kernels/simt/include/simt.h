// What kernels/csrc/cuda/launch.h promises: shared memory and launches. Sources compile with
//   g++ -std=c++20 -x c++ -DSCAPHOID_SIMT -I kernels/simt/include
// and link with kernels/simt/*.cpp, compiled with the same sanitizers (build.py does both).
#pragma once

#include "../launch.h"
#include "../shared_memory.h"

#define SHARED_ARRAY(type, name, count) type(&name)[count] = simt::static_array<type, count>(#name, [] {})
#define DYNAMIC_SHARED(type, name) type* const name = simt::dynamic_array<type>(#name)
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  simt::launch(#kernel, grid, block, shared_bytes, stream, kernel __VA_OPT__(, ) __VA_ARGS__)

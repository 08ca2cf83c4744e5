// The little that CUDA sources cannot say the same way to nvcc and to the SIMT executor (kernels/simt): shared memory
// and launches. Everything else in cuda/ is ordinary CUDA; the executor's headers stand in for CUDA's.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#ifdef SCAPHOID_SIMT
#include "simt.h"
#else
// A shared array of a constant number of elements.
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
// The launch's dynamic shared memory, as an array of `type`.
#define DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
// LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...); a template with commas in parentheses.
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

// Stands in for CUDA's header: the keywords, types and functions that kernels use, under the SIMT executor.
#pragma once

#include <math.h>

#include "../atomics.h"
#include "../barrier.h"
#include "../intrinsics.h"
#include "../runtime.h"
#include "../vectors.h"
#include "../warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

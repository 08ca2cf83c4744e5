// SCAPHOID_HD marks a function that CPU and CUDA sources share, so that a formula is written once.
#pragma once

#ifdef __CUDACC__
#define SCAPHOID_HD __host__ __device__
#else
#define SCAPHOID_HD
#endif

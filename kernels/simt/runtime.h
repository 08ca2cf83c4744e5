// The part of CUDA's runtime API that launch functions use. Device memory is host memory; a stream does all at once.
#pragma once

#include <cstddef>

#define SIMT_ERRORS(entry)                                                              \
  entry(cudaSuccess, 0, "no error") entry(cudaErrorInvalidValue, 1, "invalid argument") \
      entry(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")         \
          entry(cudaErrorLaunchFailure, 719, "unspecified launch failure")

enum cudaError_t {
#define SIMT_ENTRY(name, number, description) name = number,
  SIMT_ERRORS(SIMT_ENTRY)
#undef SIMT_ENTRY
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetLastError();

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream = nullptr);

enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

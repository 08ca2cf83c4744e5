#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>

#include "block.h"

namespace simt {
namespace {

constexpr size_t kLimit = 48 * 1024;       // of shared memory, without opting in
constexpr size_t kOptInLimit = 64 * 1024;  // of sm_75, which has the least

cudaError_t last_error = cudaSuccess;
std::string last_message;
std::map<const void*, size_t> opted_in;  // kernel -> bytes

}  // namespace

size_t dynamic_limit(const void* kernel) {
  const auto found = opted_in.find(kernel);
  return found == opted_in.end() ? kLimit : std::max(kLimit, found->second);
}

void set_error(int error, const std::string& message) {
  last_error = static_cast<cudaError_t>(error);
  last_message = message;
  std::fprintf(stderr, "%s\n", message.c_str());
}

}  // namespace simt

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define SIMT_ENTRY(name, number, description) \
  case name: return #name;
    SIMT_ERRORS(SIMT_ENTRY)
#undef SIMT_ENTRY
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
#define SIMT_ENTRY(name, number, description) \
  case name: return description;
    SIMT_ERRORS(SIMT_ENTRY)
#undef SIMT_ENTRY
  }
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() { return simt::last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::last_error;
  simt::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > simt::kOptInLimit) return simt::last_error = cudaErrorInvalidValue;
  simt::opted_in[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

// What a program or library of kernels under the executor offers its caller.
extern "C" {

// Launches from here on run their blocks and threads in the order that follows from `seed`.
__attribute__((visibility("default"))) void scaphoid_simt_seed(unsigned long long seed) {
  simt::random_order.seed(seed);
}

// What was wrong with the last launch that failed; "" before one did.
__attribute__((visibility("default"))) const char* scaphoid_simt_error() { return simt::last_message.c_str(); }
}

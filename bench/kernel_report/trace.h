// Between the kernels' launches and the tracer (trace.cpp). Forced into every kernel source of the traced build, in
// which LAUNCH is spelled TRACED_LAUNCH.
#pragma once

#include <cstddef>

extern "C" {
void trace_begin(const char* kernel, unsigned blocks, unsigned threads, size_t shared);
void trace_end();
}

struct TracedSize {
  unsigned volume;
  template <class Dim3>
  explicit TracedSize(const Dim3& size) : volume(size.x * size.y * size.z) {}
};

#define TRACED_LAUNCH(kernel, grid, block, shared, stream, ...)                                    \
  do {                                                                                             \
    trace_begin(#kernel, TracedSize(dim3(grid)).volume, TracedSize(dim3(block)).volume, (shared)); \
    LAUNCH(kernel, grid, block, shared, stream, __VA_ARGS__);                                      \
    trace_end();                                                                                   \
  } while (0)

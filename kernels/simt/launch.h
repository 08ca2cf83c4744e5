// Launches: every block of the grid in a random order, every thread a fiber, one at a time in a random order.
#pragma once

#include <tuple>
#include <type_traits>

#include "place.h"

namespace simt {

struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_bytes;
  void (*thread)(const void* call);  // what each thread runs
  const void* call;
};

// Runs it to its end; what goes wrong is in cudaGetLastError, and on stderr with the reason.
void run(const Launch& launch);

template <class... Parameters, class... Arguments>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const void* /*stream*/,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel parameters travel as bytes");
  static_assert((0 + ... + sizeof(Parameters)) <= 4096, "kernel parameters take at most 4096 bytes");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, {static_cast<Parameters>(arguments)...}};
  const auto thread = [](const void* call) {
    const auto& here = *static_cast<const Call*>(call);
    std::apply(here.kernel, here.parameters);
  };
  run({name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, thread, &call});
}

}  // namespace simt

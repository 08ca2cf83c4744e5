// What every registration needs: checks that name the op, the argument, what was expected and what came; threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace scaphoid {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

constexpr int64_t kAny = INT64_MIN;  // a size that is not fixed

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  message << "scaphoid::";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return torch::headeronly::toString(dtype);
  }
}

template <class List>
std::string list_of(const List& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + (size == kAny ? "*" : std::to_string(size));
  return text + "]";
}

inline std::string described(const Tensor& tensor) {
  return name_of(tensor.scalar_type()) + " " + list_of(tensor.sizes());
}

inline bool has_sizes(const Tensor& tensor, const Sizes& sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (sizes[d] != kAny && sizes[d] != tensor.size(d)) return false;
  }
  return true;
}

// `dims` names the dimensions for the reader, `sizes` are what they must be here.
inline void require_tensor(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                           const char* dims, const Sizes& sizes) {
  require(tensor.scalar_type() == dtype && has_sizes(tensor, sizes), op, ": ", argument, " must be ", name_of(dtype),
          " ", dims, ", here ", list_of(sizes), "; got ", described(tensor));
}

inline void require_same_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& first) {
  require(tensor.device() == first.device(), op, ": ", argument,
          " must be on the device of the first argument; move one of them with .to(device)");
}

inline void require_positive(const char* op, const char* argument, int64_t value) {
  require(value >= 1, op, ": ", argument, " must be at least 1; got ", value);
}

// A map [B, h, w] with at least one cell, each axis short enough for 32-bit cell numbers.
inline void require_map(const char* op, const char* argument, const Tensor& map, ScalarType dtype) {
  require_tensor(op, argument, map, dtype, "[B, h, w]", {kAny, kAny, kAny});
  require(map.size(1) >= 1 && map.size(2) >= 1 && map.size(1) <= INT32_MAX / map.size(2), op, ": ", argument,
          " must have between 1 and 2^31 - 1 cells an image; got ", described(map));
}

inline Tensor new_tensor(const Tensor& like, const Sizes& sizes) { return torch::stable::new_empty(like, sizes); }

// Runs work(first, last, workspace) over [0, count), threads apart, at least `grain` items a thread.
template <class Work>
void in_parallel(int64_t count, int64_t grain, size_t workspace_bytes, const Work& work) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    std::vector<double> workspace(workspace_bytes / sizeof(double) + 1);
    work(first, last, static_cast<void*>(workspace.data()));
  });
}

}  // namespace scaphoid

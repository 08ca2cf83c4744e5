#include <algorithm>
#include <tuple>

#include "../scaphoid_ops.h"
#include "checks.h"
#ifdef SCAPHOID_CUDA
#include "cuda.h"
#endif

namespace scaphoid {
namespace {

constexpr const char* kOp = "activation_maps";
constexpr int64_t kElementsPerThread = 1 << 17;

scaphoid_dtype features_dtype(const Tensor& features) {
  switch (features.scalar_type()) {
    case ScalarType::Half: return SCAPHOID_F16;
    case ScalarType::BFloat16: return SCAPHOID_BF16;
    case ScalarType::Float: return SCAPHOID_F32;
    case ScalarType::Double: return SCAPHOID_F64;
    default:
      require(false, kOp, ": features must be float16, bfloat16, float32 or float64 [B, C, h, w]; got ",
              described(features));
      return SCAPHOID_F32;
  }
}

// Whether the channels lie side by side, densely. The stride of an axis of one element says nothing.
bool channels_last(const Tensor& features) {
  const int64_t order[4] = {1, 3, 2, 0};
  int64_t stride = 1;
  for (const int64_t d : order) {
    if (features.size(d) != 1 && features.stride(d) != stride) return false;
    stride *= features.size(d);
  }
  return true;
}

// Checked arguments, dense, and the results.
struct Call {
  scaphoid_features of;
  Tensor features, weight, activation, class_activation;

  Call(const Tensor& given, const Tensor& given_weight) {
    const scaphoid_dtype dtype = features_dtype(given);
    require(given.dim() == 4, kOp, ": features must be [B, C, h, w]; got ", described(given));
    of.batch = given.size(0), of.channels = given.size(1), of.h = given.size(2), of.w = given.size(3);
    require(of.channels >= 1 && of.h >= 1 && of.w >= 1, kOp,
            ": features must have at least one channel and one cell; got ", described(given));
    const ScalarType sums = dtype == SCAPHOID_F64 ? ScalarType::Double : ScalarType::Float;
    const bool wide = given_weight.scalar_type() == sums;
    require(wide || given_weight.scalar_type() == given.scalar_type(), kOp, ": weight must be ", name_of(sums),
            " or of the features' ", name_of(given.scalar_type()), "; got ", described(given_weight));
    require_tensor(kOp, "weight", given_weight, given_weight.scalar_type(), "[K, C]", {kAny, of.channels});
    of.classes = given_weight.size(0);
    require(of.classes >= 1 && of.classes <= SCAPHOID_MAX_CLASSES, kOp, ": weight must have between 1 and ",
            SCAPHOID_MAX_CLASSES, " classes (rows); got ", described(given_weight));
    require_same_device(kOp, "weight", given_weight, given);
    of.dtype = dtype;
    of.weight_dtype = wide && dtype != SCAPHOID_F64 ? SCAPHOID_F32 : dtype;
    of.channels_last = !given.is_contiguous() && channels_last(given);
    features = of.channels_last ? given : torch::stable::contiguous(given);
    weight = torch::stable::contiguous(given_weight);
    activation = torch::stable::new_empty(given, Sizes{of.batch, of.h, of.w}, sums);
    class_activation = torch::stable::new_empty(given, Sizes{of.batch, of.h, of.w}, sums);
  }
};

std::tuple<Tensor, Tensor> activation_maps(const Tensor& features, const Tensor& weight) {
  const Call call(features, weight);
  const scaphoid_features& of = call.of;
  in_parallel(of.batch * of.h * of.w, std::max<int64_t>(1, kElementsPerThread / of.channels),
              scaphoid_activation_maps_workspace(&of), [&](int64_t first, int64_t last, void* workspace) {
                scaphoid_activation_maps_cpu(&of, call.features.const_data_ptr(), call.weight.const_data_ptr(), first,
                                             last, call.activation.mutable_data_ptr(),
                                             call.class_activation.mutable_data_ptr(), workspace);
              });
  return {call.activation, call.class_activation};
}

#ifdef SCAPHOID_CUDA
std::tuple<Tensor, Tensor> activation_maps_cuda(const Tensor& features, const Tensor& weight) {
  const Call call(features, weight);
  const scaphoid_features& of = call.of;
  // Kernels index an image's features, the weights and all maps' cells with 32 bits.
  constexpr int64_t kMost = INT32_MAX - 64;  // blocks are counted by rounding up
  require(of.h <= kMost / of.w && of.channels <= kMost / std::max(of.h * of.w, of.classes) &&
              of.batch <= kMost / (of.h * of.w),
          kOp, ": on CUDA an image's features, and the cells of all maps, must each be at most ", kMost,
          "; got features ", described(features));
  const OnDevice device(features);
  require_launched(kOp, scaphoid_activation_maps_cuda(&of, call.features.const_data_ptr(), call.weight.const_data_ptr(),
                                                      call.activation.mutable_data_ptr(),
                                                      call.class_activation.mutable_data_ptr(), device.stream()));
  return {call.activation, call.class_activation};
}
#endif

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) { m.impl("activation_maps", TORCH_BOX(&scaphoid::activation_maps)); }
#ifdef SCAPHOID_CUDA
STABLE_TORCH_LIBRARY_IMPL(scaphoid, CUDA, m) { m.impl("activation_maps", TORCH_BOX(&scaphoid::activation_maps_cuda)); }
#endif

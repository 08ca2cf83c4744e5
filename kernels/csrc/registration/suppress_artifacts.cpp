#include <algorithm>
#include <cmath>

#include "../scaphoid_ops.h"
#include "checks.h"
#include "small_maps.h"
#ifdef SCAPHOID_CUDA
#include "cuda.h"
#endif

namespace scaphoid {
namespace {

constexpr const char* kOp = "suppress_artifacts";
constexpr int64_t kPixelsPerThread = 1 << 15;

// Checked arguments, dense, and the result.
struct Call {
  int64_t batch, height, width, h, w;
  Tensor image, activation, suppressed;

  Call(const Tensor& given, const Tensor& map, double theta, double r) {
    require_tensor(kOp, "image", given, ScalarType::Byte, "[B, 1, H, W]", {kAny, 1, kAny, kAny});
    batch = given.size(0), height = given.size(2), width = given.size(3);
    require(height >= 1 && width >= 1, kOp, ": image must have at least one pixel; got ", described(given));
    constexpr int64_t kMost = INT32_MAX - 512;  // columns are counted past the last one
    require(height <= kMost / width, kOp, ": image must have at most ", kMost, " pixels; got ", described(given));
    require_map(kOp, "activation", map, ScalarType::Float);
    h = map.size(1), w = map.size(2);
    require_tensor(kOp, "activation", map, ScalarType::Float, "[B, h, w]", {batch, h, w});
    require_same_device(kOp, "activation", map, given);
    require(std::isfinite(theta), kOp, ": theta must be finite; got ", theta);
    require(r >= 0 && r <= 1, kOp, ": r must be in [0, 1]; got ", r);
    image = torch::stable::contiguous(given);
    activation = torch::stable::contiguous(map);
    suppressed = new_tensor(given, {batch, 1, height, width});
  }
};

Tensor suppress_artifacts(const Tensor& image, const Tensor& activation, double theta, double r) {
  const Call call(image, activation, theta, r);
  const auto* from = call.image.const_data_ptr<uint8_t>();
  const auto* map = call.activation.const_data_ptr<float>();
  auto* to = call.suppressed.mutable_data_ptr<uint8_t>();
  in_parallel(call.batch * call.height, std::max<int64_t>(1, kPixelsPerThread / call.width),
              scaphoid_suppress_artifacts_workspace(call.width), [&](int64_t first, int64_t last, void* workspace) {
                scaphoid_suppress_artifacts_cpu(from, map, call.h, call.w, call.height, call.width, theta, r, first,
                                                last, to, workspace);
              });
  return call.suppressed;
}

#ifdef SCAPHOID_CUDA
Tensor suppress_artifacts_cuda(const Tensor& image, const Tensor& activation, double theta, double r) {
  const Call call(image, activation, theta, r);
  require_small_map(kOp, "activation", activation);
  // A block takes a tile of 8 rows and 512 columns.
  require(call.batch <= INT32_MAX / ((call.height + 7) / 8 * ((call.width + 511) / 512)), kOp,
          ": on CUDA image must have at most 2^31 - 1 tiles of 8 x 512 pixels; got ", described(image));
  const OnDevice device(image);
  require_launched(kOp, scaphoid_suppress_artifacts_cuda(call.image.const_data_ptr<uint8_t>(),
                                                         call.activation.const_data_ptr<float>(), call.batch, call.h,
                                                         call.w, call.height, call.width, theta, r,
                                                         call.suppressed.mutable_data_ptr<uint8_t>(), device.stream()));
  return call.suppressed;
}
#endif

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) { m.impl("suppress_artifacts", TORCH_BOX(&scaphoid::suppress_artifacts)); }
#ifdef SCAPHOID_CUDA
STABLE_TORCH_LIBRARY_IMPL(scaphoid, CUDA, m) {
  m.impl("suppress_artifacts", TORCH_BOX(&scaphoid::suppress_artifacts_cuda));
}
#endif

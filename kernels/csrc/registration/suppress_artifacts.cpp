#include <algorithm>
#include <cmath>

#include "../scaphoid_ops.h"
#include "checks.h"

namespace scaphoid {
namespace {

constexpr int64_t kPixelsPerThread = 1 << 15;

Tensor suppress_artifacts(const Tensor& image, const Tensor& activation, double theta, double r) {
  require_tensor("suppress_artifacts", "image", image, ScalarType::Byte, "[B, 1, H, W]", {kAny, 1, kAny, kAny});
  const int64_t batch = image.size(0), height = image.size(2), width = image.size(3);
  require(height >= 1 && width >= 1, "suppress_artifacts: image must have at least one pixel; got ", described(image));
  require_map("suppress_artifacts", "activation", activation, ScalarType::Float);
  const int64_t h = activation.size(1), w = activation.size(2);
  require_tensor("suppress_artifacts", "activation", activation, ScalarType::Float, "[B, h, w]", {batch, h, w});
  require_same_device("suppress_artifacts", "activation", activation, image);
  require(std::isfinite(theta), "suppress_artifacts: theta must be finite; got ", theta);
  require(r >= 0 && r <= 1, "suppress_artifacts: r must be in [0, 1]; got ", r);

  const Tensor pixels = torch::stable::contiguous(image), maps = torch::stable::contiguous(activation);
  Tensor suppressed = new_tensor(image, {batch, 1, height, width});
  const auto* from = pixels.const_data_ptr<uint8_t>();
  const auto* map = maps.const_data_ptr<float>();
  auto* to = suppressed.mutable_data_ptr<uint8_t>();
  in_parallel(batch * height, std::max<int64_t>(1, kPixelsPerThread / width),
              scaphoid_suppress_artifacts_workspace(width), [&](int64_t first, int64_t last, void* workspace) {
                scaphoid_suppress_artifacts_cpu(from, map, h, w, height, width, theta, r, first, last, to, workspace);
              });
  return suppressed;
}

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) { m.impl("suppress_artifacts", TORCH_BOX(&scaphoid::suppress_artifacts)); }

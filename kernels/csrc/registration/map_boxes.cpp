#include "../scaphoid_ops.h"
#include "checks.h"
#ifdef SCAPHOID_CUDA
#include "cuda.h"
#endif

namespace scaphoid {
namespace {

constexpr int64_t kMaxWindows = 1024;  // ranking compares every two of them

void check(const Tensor& boxes, const Tensor& scores, double gamma, const Tensor& object_boxes, int64_t height,
           int64_t width, const Tensor& original_sizes) {
  require_tensor("map_boxes", "boxes", boxes, ScalarType::Float, "[B, n, 4]", {kAny, kAny, 4});
  const int64_t batch = boxes.size(0), n = boxes.size(1);
  require(n <= kMaxWindows, "map_boxes: boxes must have at most ", kMaxWindows, " windows an image; got ",
          described(boxes));
  require_tensor("map_boxes", "scores", scores, ScalarType::Float, "[B, n]", {batch, n});
  require(gamma > 0 && gamma <= 1, "map_boxes: gamma must be in (0, 1]; got ", gamma);
  require_tensor("map_boxes", "object_boxes", object_boxes, ScalarType::Float, "[B, 4]", {batch, 4});
  require_positive("map_boxes", "height", height);
  require_positive("map_boxes", "width", width);
  require_tensor("map_boxes", "original_sizes", original_sizes, ScalarType::Int, "[B, 2] (height, width)", {batch, 2});
  require_same_device("map_boxes", "scores", scores, boxes);
  require_same_device("map_boxes", "object_boxes", object_boxes, boxes);
  require_same_device("map_boxes", "original_sizes", original_sizes, boxes);
}

Tensor map_boxes(const Tensor& boxes, const Tensor& scores, double gamma, const Tensor& object_boxes, int64_t height,
                 int64_t width, const Tensor& original_sizes) {
  check(boxes, scores, gamma, object_boxes, height, width, original_sizes);
  const int64_t batch = boxes.size(0), n = boxes.size(1);
  const Tensor windows = torch::stable::contiguous(boxes), order = torch::stable::contiguous(scores);
  const Tensor objects = torch::stable::contiguous(object_boxes), sizes = torch::stable::contiguous(original_sizes);
  Tensor mapped = new_tensor(boxes, {batch, 4});
  const auto *box = windows.const_data_ptr<float>(), *score = order.const_data_ptr<float>();
  const auto* object = objects.const_data_ptr<float>();
  const auto* size = sizes.const_data_ptr<int32_t>();
  auto* out = mapped.mutable_data_ptr<float>();
  in_parallel(batch, 256, 0, [&](int64_t first, int64_t last, void*) {
    scaphoid_map_boxes_cpu(box + first * n * 4, score + first * n, gamma, object + first * 4, size + first * 2,
                           last - first, n, height, width, out + first * 4);
  });
  return mapped;
}

#ifdef SCAPHOID_CUDA
Tensor map_boxes_cuda(const Tensor& boxes, const Tensor& scores, double gamma, const Tensor& object_boxes,
                      int64_t height, int64_t width, const Tensor& original_sizes) {
  check(boxes, scores, gamma, object_boxes, height, width, original_sizes);
  require(boxes.size(0) <= INT32_MAX, "map_boxes: boxes must have at most 2^31 - 1 images on CUDA; got ",
          described(boxes));
  const OnDevice device(boxes);
  const int64_t batch = boxes.size(0), n = boxes.size(1);
  const Tensor windows = torch::stable::contiguous(boxes), order = torch::stable::contiguous(scores);
  const Tensor objects = torch::stable::contiguous(object_boxes), sizes = torch::stable::contiguous(original_sizes);
  Tensor mapped = new_tensor(boxes, {batch, 4});
  require_launched("map_boxes",
                   scaphoid_map_boxes_cuda(windows.const_data_ptr<float>(), order.const_data_ptr<float>(), gamma,
                                           objects.const_data_ptr<float>(), sizes.const_data_ptr<int32_t>(), batch, n,
                                           height, width, mapped.mutable_data_ptr<float>(), device.stream()));
  return mapped;
}
#endif

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) { m.impl("map_boxes", TORCH_BOX(&scaphoid::map_boxes)); }
#ifdef SCAPHOID_CUDA
STABLE_TORCH_LIBRARY_IMPL(scaphoid, CUDA, m) { m.impl("map_boxes", TORCH_BOX(&scaphoid::map_boxes_cuda)); }
#endif

#include <tuple>

#include "../scaphoid_ops.h"
#include "checks.h"

namespace scaphoid {
namespace {

std::tuple<Tensor, Tensor> object_box(const Tensor& activation, const Tensor& class_activation, int64_t height,
                                      int64_t width) {
  require_map("object_box", "activation", activation, ScalarType::Float);
  const int64_t batch = activation.size(0), h = activation.size(1), w = activation.size(2);
  require_tensor("object_box", "class_activation", class_activation, ScalarType::Float, "[B, h, w] like activation",
                 {batch, h, w});
  require_same_device("object_box", "class_activation", class_activation, activation);
  require_positive("object_box", "height", height);
  require_positive("object_box", "width", width);

  const Tensor maps = torch::stable::contiguous(activation), class_maps = torch::stable::contiguous(class_activation);
  Tensor boxes = new_tensor(activation, {batch, 4}), margin = new_tensor(activation, {batch});
  const auto *from = maps.const_data_ptr<float>(), *of_class = class_maps.const_data_ptr<float>();
  auto *box = boxes.mutable_data_ptr<float>(), *distance = margin.mutable_data_ptr<float>();
  in_parallel(batch, 16, scaphoid_object_box_workspace(h, w), [&](int64_t first, int64_t last, void* workspace) {
    scaphoid_object_box_cpu(from + first * h * w, of_class + first * h * w, last - first, h, w, height, width,
                            box + first * 4, distance + first, workspace);
  });
  return {boxes, margin};
}

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) { m.impl("object_box", TORCH_BOX(&scaphoid::object_box)); }

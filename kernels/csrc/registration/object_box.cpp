#include <tuple>

#include "../scaphoid_ops.h"
#include "checks.h"
#include "small_maps.h"
#ifdef SCAPHOID_CUDA
#include "cuda.h"
#endif

namespace scaphoid {
namespace {

void check(const Tensor& activation, const Tensor& class_activation, int64_t height, int64_t width) {
  require_map("object_box", "activation", activation, ScalarType::Float);
  require_tensor("object_box", "class_activation", class_activation, ScalarType::Float, "[B, h, w] like activation",
                 {activation.size(0), activation.size(1), activation.size(2)});
  require_same_device("object_box", "class_activation", class_activation, activation);
  require_positive("object_box", "height", height);
  require_positive("object_box", "width", width);
}

// Dense inputs and new outputs.
struct Call {
  Tensor maps, class_maps, boxes, margin;
  int64_t batch, h, w;

  Call(const Tensor& activation, const Tensor& class_activation)
      : maps(torch::stable::contiguous(activation)),
        class_maps(torch::stable::contiguous(class_activation)),
        boxes(new_tensor(activation, {activation.size(0), 4})),
        margin(new_tensor(activation, {activation.size(0)})),
        batch(activation.size(0)),
        h(activation.size(1)),
        w(activation.size(2)) {}
};

std::tuple<Tensor, Tensor> object_box(const Tensor& activation, const Tensor& class_activation, int64_t height,
                                      int64_t width) {
  check(activation, class_activation, height, width);
  Call call(activation, class_activation);
  const auto *from = call.maps.const_data_ptr<float>(), *of_class = call.class_maps.const_data_ptr<float>();
  auto *box = call.boxes.mutable_data_ptr<float>(), *distance = call.margin.mutable_data_ptr<float>();
  const int64_t cells = call.h * call.w;
  const size_t workspace_bytes = scaphoid_object_box_workspace(call.h, call.w);
  in_parallel(call.batch, images_a_thread(cells), workspace_bytes, [&](int64_t first, int64_t last, void* workspace) {
    scaphoid_object_box_cpu(from + first * cells, of_class + first * cells, last - first, call.h, call.w, height, width,
                            box + first * 4, distance + first, workspace);
  });
  return {call.boxes, call.margin};
}

#ifdef SCAPHOID_CUDA
std::tuple<Tensor, Tensor> object_box_cuda(const Tensor& activation, const Tensor& class_activation, int64_t height,
                                           int64_t width) {
  check(activation, class_activation, height, width);
  require_small_map("object_box", "activation", activation);
  const OnDevice device(activation);
  Call call(activation, class_activation);
  require_launched("object_box", scaphoid_object_box_cuda(call.maps.const_data_ptr<float>(),
                                                          call.class_maps.const_data_ptr<float>(), call.batch, call.h,
                                                          call.w, height, width, call.boxes.mutable_data_ptr<float>(),
                                                          call.margin.mutable_data_ptr<float>(), device.stream()));
  return {call.boxes, call.margin};
}
#endif

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) { m.impl("object_box", TORCH_BOX(&scaphoid::object_box)); }
#ifdef SCAPHOID_CUDA
STABLE_TORCH_LIBRARY_IMPL(scaphoid, CUDA, m) { m.impl("object_box", TORCH_BOX(&scaphoid::object_box_cuda)); }
#endif

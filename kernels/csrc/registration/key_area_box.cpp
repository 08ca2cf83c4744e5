#include <tuple>

#include "../scaphoid_ops.h"
#include "checks.h"

namespace scaphoid {
namespace {

template <class Real, class Launch>
void launch_key_area_box(const Tensor (&inputs)[5], int64_t height, int64_t width, Tensor& boxes, Tensor& margin,
                         const Launch& launch) {
  const int64_t batch = inputs[0].size(0), h = inputs[0].size(1), w = inputs[0].size(2);
  const Real* in[5];
  for (int i = 0; i < 5; ++i) in[i] = inputs[i].const_data_ptr<Real>();
  auto *box = boxes.mutable_data_ptr<Real>(), *distance = margin.mutable_data_ptr<Real>();
  in_parallel(batch, 16, scaphoid_key_area_box_workspace(h, w), [&](int64_t first, int64_t last, void* workspace) {
    launch(in[0] + first * h * w, in[1], in[2], in[3], in[4], last - first, h, w, height, width, box + first * 4,
           distance + first, workspace);
  });
}

std::tuple<Tensor, Tensor> key_area_box(const Tensor& activation, const Tensor& width_weight, const Tensor& width_bias,
                                        const Tensor& height_weight, const Tensor& height_bias, int64_t height,
                                        int64_t width) {
  const bool in_double = activation.scalar_type() == ScalarType::Double;
  const ScalarType dtype = in_double ? ScalarType::Double : ScalarType::Float;
  require_map("key_area_box", "activation", activation, dtype);
  const int64_t batch = activation.size(0), h = activation.size(1), w = activation.size(2);
  const struct {
    const char *name, *dims;
    const Tensor& tensor;
    int64_t size;
  } layers[4] = {{"width_weight", "[w]", width_weight, w},
                 {"width_bias", "[1]", width_bias, 1},
                 {"height_weight", "[h]", height_weight, h},
                 {"height_bias", "[1]", height_bias, 1}};
  for (const auto& layer : layers) {
    require_tensor("key_area_box", layer.name, layer.tensor, dtype, layer.dims, {layer.size});
    require_same_device("key_area_box", layer.name, layer.tensor, activation);
  }
  require_positive("key_area_box", "height", height);
  require_positive("key_area_box", "width", width);

  const Tensor inputs[5] = {torch::stable::contiguous(activation), torch::stable::contiguous(width_weight),
                            torch::stable::contiguous(width_bias), torch::stable::contiguous(height_weight),
                            torch::stable::contiguous(height_bias)};
  Tensor boxes = new_tensor(activation, {batch, 4}), margin = new_tensor(activation, {batch});
  if (in_double) {
    launch_key_area_box<double>(inputs, height, width, boxes, margin, scaphoid_key_area_box_cpu_f64);
  } else {
    launch_key_area_box<float>(inputs, height, width, boxes, margin, scaphoid_key_area_box_cpu_f32);
  }
  return {boxes, margin};
}

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) { m.impl("key_area_box", TORCH_BOX(&scaphoid::key_area_box)); }

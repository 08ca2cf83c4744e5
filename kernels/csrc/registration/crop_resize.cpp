#include <algorithm>
#include <tuple>

#include "../scaphoid_ops.h"
#include "checks.h"

namespace scaphoid {
namespace {

constexpr int64_t kPixelsPerThread = 1 << 15;

// Positions are computed in float32, in float64 for float64 images.
ScalarType box_dtype(const char* op, const Tensor& image) {
  const ScalarType dtype = image.scalar_type();
  require(dtype == ScalarType::Byte || dtype == ScalarType::Float || dtype == ScalarType::Double, op,
          ": image must be uint8, float32 or float64 [B, C, H, W]; got ", described(image));
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

scaphoid_crops crops_of(const char* op, const Tensor& image, const Tensor& boxes, int64_t size) {
  const ScalarType dtype = box_dtype(op, image);
  require_tensor(op, "image", image, image.scalar_type(), "[B, C, H, W]", {kAny, kAny, kAny, kAny});
  require(image.size(2) >= 1 && image.size(3) >= 1, op, ": image must have at least one pixel; got ", described(image));
  require_tensor(op, "boxes", boxes, dtype, "[B, n, 4]", {image.size(0), kAny, 4});
  require_same_device(op, "boxes", boxes, image);
  require_positive(op, "size", size);
  return {image.size(0),   image.size(1),   image.size(2),   image.size(3), image.stride(0),
          image.stride(1), image.stride(2), image.stride(3), boxes.size(1), size};
}

template <class Pixel, class Real, class Launch>
void launch_crop_resize(const scaphoid_crops& of, const Tensor& image, const Tensor& boxes, Tensor& crops,
                        const Launch& launch) {
  const auto* pixels = image.const_data_ptr<Pixel>();
  const auto* box = boxes.const_data_ptr<Real>();
  auto* out = crops.mutable_data_ptr<Pixel>();
  const int64_t grain = std::max<int64_t>(1, kPixelsPerThread / std::max<int64_t>(1, of.size * of.channels));
  in_parallel(
      of.batch * of.count * of.size, grain, scaphoid_crop_resize_workspace(of.size),
      [&](int64_t first, int64_t last, void* workspace) { launch(&of, pixels, box, first, last, out, workspace); });
}

Tensor crop_resize(const Tensor& image, const Tensor& boxes, int64_t size) {
  const scaphoid_crops of = crops_of("crop_resize", image, boxes, size);
  const Tensor dense_boxes = torch::stable::contiguous(boxes);
  Tensor crops = new_tensor(image, {of.batch, of.count, of.channels, size, size});
  switch (image.scalar_type()) {
    case ScalarType::Byte:
      launch_crop_resize<uint8_t, float>(of, image, dense_boxes, crops, scaphoid_crop_resize_cpu_u8);
      break;
    case ScalarType::Float:
      launch_crop_resize<float, float>(of, image, dense_boxes, crops, scaphoid_crop_resize_cpu_f32);
      break;
    default: launch_crop_resize<double, double>(of, image, dense_boxes, crops, scaphoid_crop_resize_cpu_f64);
  }
  return crops;
}

template <class Real, class Launch>
void launch_backward(const scaphoid_crops& of, const Tensor& grad, const Tensor& image, const Tensor& boxes,
                     Tensor& grad_image, Tensor& grad_boxes, const Launch& launch) {
  const auto *from = grad.const_data_ptr<Real>(), *pixels = image.const_data_ptr<Real>();
  const auto* box = boxes.const_data_ptr<Real>();
  auto *to_image = grad_image.mutable_data_ptr<Real>(), *to_boxes = grad_boxes.mutable_data_ptr<Real>();
  in_parallel(of.batch, 1, 0, [&](int64_t first, int64_t last, void*) {
    launch(&of, from, pixels, box, first, last, to_image, to_boxes);
  });
}

std::tuple<Tensor, Tensor> crop_resize_backward(const Tensor& grad, const Tensor& image, const Tensor& boxes) {
  const char* op = "crop_resize_backward";
  require(grad.dim() == 5, op, ": grad must be [B, n, C, size, size]; got ", described(grad));
  require(image.scalar_type() != ScalarType::Byte, op, ": image must be float32 or float64; got ", described(image));
  const scaphoid_crops of = crops_of(op, image, boxes, grad.size(4));
  require_tensor(op, "grad", grad, image.scalar_type(), "[B, n, C, size, size]",
                 {of.batch, of.count, of.channels, of.size, of.size});
  require_same_device(op, "grad", grad, image);

  const Tensor dense_grad = torch::stable::contiguous(grad), dense_boxes = torch::stable::contiguous(boxes);
  Tensor grad_image = new_tensor(image, {of.batch, of.channels, of.height, of.width});
  Tensor grad_boxes = new_tensor(image, {of.batch, of.count, 4});
  if (image.scalar_type() == ScalarType::Double) {
    launch_backward<double>(of, dense_grad, image, dense_boxes, grad_image, grad_boxes,
                            scaphoid_crop_resize_backward_cpu_f64);
  } else {
    launch_backward<float>(of, dense_grad, image, dense_boxes, grad_image, grad_boxes,
                           scaphoid_crop_resize_backward_cpu_f32);
  }
  return {grad_image, grad_boxes};
}

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) {
  m.impl("crop_resize", TORCH_BOX(&scaphoid::crop_resize));
  m.impl("crop_resize_backward", TORCH_BOX(&scaphoid::crop_resize_backward));
}

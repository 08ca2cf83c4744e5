#include <algorithm>
#include <tuple>

#include "../scaphoid_ops.h"
#include "checks.h"
#ifdef SCAPHOID_CUDA
#include "cuda.h"
#endif

namespace scaphoid {
namespace {

constexpr int64_t kPixelsPerThread = 1 << 15;
constexpr int64_t kMaxSide = 1 << 24;  // the whole numbers that float32 counts

scaphoid_dtype pixels_of(const char* op, const Tensor& image) {
  switch (image.scalar_type()) {
    case ScalarType::Byte: return SCAPHOID_U8;
    case ScalarType::Half: return SCAPHOID_F16;
    case ScalarType::BFloat16: return SCAPHOID_BF16;
    case ScalarType::Float: return SCAPHOID_F32;
    case ScalarType::Double: return SCAPHOID_F64;
    default:
      require(false, op, ": image must be uint8, float16, bfloat16, float32 or float64 [B, C, H, W]; got ",
              described(image));
      return SCAPHOID_U8;
  }
}

// Positions and gradients are computed in float32, in float64 for float64 images.
ScalarType box_dtype(const Tensor& image) {
  return image.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

scaphoid_crops crops_of(const char* op, const Tensor& image, const Tensor& boxes, int64_t size) {
  pixels_of(op, image);
  require_tensor(op, "image", image, image.scalar_type(), "[B, C, H, W]", {kAny, kAny, kAny, kAny});
  require(image.size(2) >= 1 && image.size(3) >= 1, op, ": image must have at least one pixel; got ", described(image));
  require(image.size(2) <= kMaxSide && image.size(3) <= kMaxSide, op, ": image sides must be at most ", kMaxSide,
          "; got ", described(image));
  require_tensor(op, "boxes", boxes, box_dtype(image), "[B, n, 4]", {image.size(0), kAny, 4});
  require_same_device(op, "boxes", boxes, image);
  require_positive(op, "size", size);
  require(size <= kMaxSide, op, ": size must be at most ", kMaxSide, "; got ", size);
  return {image.size(0),   image.size(1),   image.size(2),   image.size(3), image.stride(0),
          image.stride(1), image.stride(2), image.stride(3), boxes.size(1), size};
}

Tensor new_crops(const scaphoid_crops& of, const Tensor& image) {
  return new_tensor(image, {of.batch, of.count, of.channels, of.size, of.size});
}

Tensor crop_resize(const Tensor& image, const Tensor& boxes, int64_t size) {
  const scaphoid_crops of = crops_of("crop_resize", image, boxes, size);
  const scaphoid_dtype dtype = pixels_of("crop_resize", image);
  const Tensor dense_boxes = torch::stable::contiguous(boxes);
  Tensor crops = new_crops(of, image);
  if (crops.numel() == 0) return crops;
  const int64_t grain = std::max<int64_t>(1, kPixelsPerThread / std::max<int64_t>(1, of.size * of.channels));
  in_parallel(of.batch * of.count * of.size, grain, scaphoid_crop_resize_workspace(&of),
              [&](int64_t first, int64_t last, void* workspace) {
                scaphoid_crop_resize_cpu(&of, dtype, image.const_data_ptr(), dense_boxes.const_data_ptr(), first, last,
                                         crops.mutable_data_ptr(), workspace);
              });
  return crops;
}

// Checked arguments of the backward, dense where it needs them so, and its results: the image's gradient is summed in
// the type of the boxes. A gradient that is not wanted has no elements.
struct Backward {
  scaphoid_crops of;
  scaphoid_dtype dtype;
  Tensor grad, boxes, grad_image, grad_boxes;

  static Backward of_tensors(const Tensor& grad, const Tensor& image, const Tensor& boxes, bool to_image,
                             bool to_boxes) {
    const char* op = "crop_resize_backward";
    require(grad.dim() == 5, op, ": grad must be [B, n, C, size, size]; got ", described(grad));
    require(image.scalar_type() != ScalarType::Byte, op, ": image must be float16, bfloat16, float32 or float64; got ",
            described(image));
    const scaphoid_crops of = crops_of(op, image, boxes, grad.size(4));
    require_tensor(op, "grad", grad, image.scalar_type(), "[B, n, C, size, size]",
                   {of.batch, of.count, of.channels, of.size, of.size});
    require_same_device(op, "grad", grad, image);
    return {of,
            pixels_of(op, image),
            torch::stable::contiguous(grad),
            torch::stable::contiguous(boxes),
            new_tensor(boxes, to_image ? Sizes{of.batch, of.channels, of.height, of.width} : Sizes{0}),
            new_tensor(boxes, to_boxes ? Sizes{of.batch, of.count, 4} : Sizes{0})};
  }

  std::tuple<Tensor, Tensor> results(const Tensor& image) const {
    return {torch::stable::to(grad_image, image.scalar_type()), grad_boxes};
  }
};

std::tuple<Tensor, Tensor> crop_resize_backward(const Tensor& grad, const Tensor& image, const Tensor& boxes,
                                                bool /*deterministic: always, here*/, bool to_image, bool to_boxes) {
  const Backward run = Backward::of_tensors(grad, image, boxes, to_image, to_boxes);
  in_parallel(run.of.batch, 1, scaphoid_crop_resize_backward_workspace(&run.of),
              [&](int64_t first, int64_t last, void* workspace) {
                scaphoid_crop_resize_backward_cpu(&run.of, run.dtype, run.grad.const_data_ptr(), image.const_data_ptr(),
                                                  run.boxes.const_data_ptr(), first, last,
                                                  to_image ? run.grad_image.mutable_data_ptr() : nullptr,
                                                  to_boxes ? run.grad_boxes.mutable_data_ptr() : nullptr, workspace);
              });
  return run.results(image);
}

#ifdef SCAPHOID_CUDA
// Kernels index an image and a crop with 32 bits.
void require_32_bits(const char* op, const scaphoid_crops& of, const Tensor& image) {
  const auto span = [&](int64_t channel, int64_t row, int64_t column) {
    return static_cast<double>(of.channels - 1) * channel + static_cast<double>(of.height - 1) * row +
           static_cast<double>(of.width - 1) * column;
  };
  const double largest = std::max({span(of.channel_stride, of.row_stride, of.column_stride),
                                   static_cast<double>(of.channels) * of.height * of.width,
                                   static_cast<double>(std::max<int64_t>(of.channels, 1)) * of.size * of.size,
                                   static_cast<double>(of.batch) * of.count});
  require(largest <= INT32_MAX, op, ": on CUDA an image (with its strides), a crop and the number of crops must each ",
          "fit 32-bit offsets; got image ", described(image), " with strides ", list_of(image.strides()), ", ",
          of.count, " boxes an image, size ", of.size);
}

Tensor crop_resize_cuda(const Tensor& image, const Tensor& boxes, int64_t size) {
  const scaphoid_crops of = crops_of("crop_resize", image, boxes, size);
  require_32_bits("crop_resize", of, image);
  const OnDevice device(image);
  const Tensor dense_boxes = torch::stable::contiguous(boxes);
  Tensor crops = new_crops(of, image);
  require_launched("crop_resize",
                   scaphoid_crop_resize_cuda(&of, pixels_of("crop_resize", image), image.const_data_ptr(),
                                             dense_boxes.const_data_ptr(), crops.mutable_data_ptr(), device.stream()));
  return crops;
}

std::tuple<Tensor, Tensor> crop_resize_backward_cuda(const Tensor& grad, const Tensor& image, const Tensor& boxes,
                                                     bool deterministic, bool to_image, bool to_boxes) {
  const Backward run = Backward::of_tensors(grad, image, boxes, to_image, to_boxes);
  require_32_bits("crop_resize_backward", run.of, image);
  require(static_cast<double>(run.of.batch) * run.of.channels * run.of.height * run.of.width <= INT32_MAX,
          "crop_resize_backward: on CUDA image must have at most 2^31 - 1 pixels in all; got ", described(image));
  const OnDevice device(image);
  const Tensor workspace = device_workspace(image, scaphoid_crop_resize_backward_cuda_workspace(&run.of));
  require_launched("crop_resize_backward",
                   scaphoid_crop_resize_backward_cuda(&run.of, run.dtype, run.grad.const_data_ptr(),
                                                      image.const_data_ptr(), run.boxes.const_data_ptr(), deterministic,
                                                      to_image ? run.grad_image.mutable_data_ptr() : nullptr,
                                                      to_boxes ? run.grad_boxes.mutable_data_ptr() : nullptr,
                                                      workspace.mutable_data_ptr(), device.stream()));
  return run.results(image);
}
#endif

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) {
  m.impl("crop_resize", TORCH_BOX(&scaphoid::crop_resize));
  m.impl("crop_resize_backward", TORCH_BOX(&scaphoid::crop_resize_backward));
}

#ifdef SCAPHOID_CUDA
STABLE_TORCH_LIBRARY_IMPL(scaphoid, CUDA, m) {
  m.impl("crop_resize", TORCH_BOX(&scaphoid::crop_resize_cuda));
  m.impl("crop_resize_backward", TORCH_BOX(&scaphoid::crop_resize_backward_cuda));
}
#endif

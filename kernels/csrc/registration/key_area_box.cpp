#include <tuple>

#include "../scaphoid_ops.h"
#include "checks.h"
#include "small_maps.h"
#ifdef SCAPHOID_CUDA
#include "cuda.h"
#endif

namespace scaphoid {
namespace {

constexpr const char* kOp = "key_area_box";

// Checked arguments, dense, and the results.
struct Call {
  scaphoid_dtype dtype;
  int64_t batch, h, w, height, width;
  Tensor activation, layers[4], boxes, margin;

  Call(const Tensor& map, const Tensor& width_weight, const Tensor& width_bias, const Tensor& height_weight,
       const Tensor& height_bias, int64_t in_height, int64_t in_width)
      : height(in_height), width(in_width) {
    const bool in_double = map.scalar_type() == ScalarType::Double;
    const ScalarType type = in_double ? ScalarType::Double : ScalarType::Float;
    dtype = in_double ? SCAPHOID_F64 : SCAPHOID_F32;
    require_map(kOp, "activation", map, type);
    batch = map.size(0), h = map.size(1), w = map.size(2);
    const struct {
      const char *name, *dims;
      const Tensor& tensor;
      int64_t size;
    } given[4] = {{"width_weight", "[w]", width_weight, w},
                  {"width_bias", "[1]", width_bias, 1},
                  {"height_weight", "[h]", height_weight, h},
                  {"height_bias", "[1]", height_bias, 1}};
    for (int i = 0; i < 4; ++i) {
      require_tensor(kOp, given[i].name, given[i].tensor, type, given[i].dims, {given[i].size});
      require_same_device(kOp, given[i].name, given[i].tensor, map);
      layers[i] = torch::stable::contiguous(given[i].tensor);
    }
    require_positive(kOp, "height", height);
    require_positive(kOp, "width", width);
    activation = torch::stable::contiguous(map);
    boxes = new_tensor(map, {batch, 4});
    margin = new_tensor(map, {batch});
  }
};

std::tuple<Tensor, Tensor> key_area_box(const Tensor& activation, const Tensor& width_weight, const Tensor& width_bias,
                                        const Tensor& height_weight, const Tensor& height_bias, int64_t height,
                                        int64_t width) {
  const Call call(activation, width_weight, width_bias, height_weight, height_bias, height, width);
  const auto at = [&](const Tensor& tensor, int64_t index) {
    const int64_t bytes = call.dtype == SCAPHOID_F64 ? sizeof(double) : sizeof(float);
    return static_cast<char*>(tensor.mutable_data_ptr()) + index * bytes;
  };
  in_parallel(call.batch, 16, scaphoid_key_area_box_workspace(call.h, call.w),
              [&](int64_t first, int64_t last, void* workspace) {
                scaphoid_key_area_box_cpu(call.dtype, at(call.activation, first * call.h * call.w),
                                          call.layers[0].const_data_ptr(), call.layers[1].const_data_ptr(),
                                          call.layers[2].const_data_ptr(), call.layers[3].const_data_ptr(),
                                          last - first, call.h, call.w, height, width, at(call.boxes, first * 4),
                                          at(call.margin, first), workspace);
              });
  return {call.boxes, call.margin};
}

#ifdef SCAPHOID_CUDA
std::tuple<Tensor, Tensor> key_area_box_cuda(const Tensor& activation, const Tensor& width_weight,
                                             const Tensor& width_bias, const Tensor& height_weight,
                                             const Tensor& height_bias, int64_t height, int64_t width) {
  const Call call(activation, width_weight, width_bias, height_weight, height_bias, height, width);
  require_small_map(kOp, "activation", activation);
  const OnDevice device(activation);
  require_launched(
      kOp, scaphoid_key_area_box_cuda(call.dtype, call.activation.const_data_ptr(), call.layers[0].const_data_ptr(),
                                      call.layers[1].const_data_ptr(), call.layers[2].const_data_ptr(),
                                      call.layers[3].const_data_ptr(), call.batch, call.h, call.w, height, width,
                                      call.boxes.mutable_data_ptr(), call.margin.mutable_data_ptr(), device.stream()));
  return {call.boxes, call.margin};
}
#endif

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) { m.impl("key_area_box", TORCH_BOX(&scaphoid::key_area_box)); }
#ifdef SCAPHOID_CUDA
STABLE_TORCH_LIBRARY_IMPL(scaphoid, CUDA, m) { m.impl("key_area_box", TORCH_BOX(&scaphoid::key_area_box_cuda)); }
#endif

// Every op's schema, once. What each computes and refuses is documented by its Python wrapper, kernels/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(scaphoid, m) {
  m.def("activation_maps(Tensor features, Tensor weight) -> (Tensor, Tensor)");
  m.def("object_box(Tensor activation, Tensor class_activation, SymInt height, SymInt width) -> (Tensor, Tensor)");
  m.def(
      "key_area_box(Tensor activation, Tensor width_weight, Tensor width_bias, Tensor height_weight, "
      "Tensor height_bias, SymInt height, SymInt width) -> (Tensor, Tensor)");
  m.def(
      "part_windows(Tensor activation, SymInt height, SymInt width, int[] window_shapes, int[] group_sizes, "
      "int[] group_counts, float iou_threshold) -> (Tensor, Tensor, Tensor)");
  m.def("crop_resize(Tensor image, Tensor boxes, SymInt size) -> Tensor");
  m.def(
      "crop_resize_backward(Tensor grad, Tensor image, Tensor boxes, bool deterministic=False, bool to_image=True, "
      "bool to_boxes=True) -> (Tensor, Tensor)");
  m.def("suppress_artifacts(Tensor image, Tensor activation, float theta, float r) -> Tensor");
  m.def(
      "map_boxes(Tensor boxes, Tensor scores, float gamma, Tensor object_boxes, SymInt height, SymInt width, "
      "Tensor original_sizes) -> Tensor");
}

#include <numeric>
#include <tuple>

#include "../scaphoid_ops.h"
#include "checks.h"

namespace scaphoid {
namespace {

void require_groups(const Sizes& shapes, const Sizes& sizes, const Sizes& counts, int64_t h, int64_t w) {
  require(shapes.size() % 2 == 0, "part_windows: window_shapes must be pairs of height and width; got ", shapes.size(),
          " numbers");
  for (size_t i = 0; i < shapes.size(); i += 2) {
    require(shapes[i] >= 1 && shapes[i] <= h && shapes[i + 1] >= 1 && shapes[i + 1] <= w,
            "part_windows: window_shapes must be between [1, 1] and the map's [", h, ", ", w, "] cells; got [",
            shapes[i], ", ", shapes[i + 1], "]");
  }
  require(sizes.size() == counts.size(), "part_windows: group_sizes and group_counts must be equally long; got ",
          list_of(sizes), " and ", list_of(counts));
  for (const int64_t size : sizes) {
    require(size >= 1, "part_windows: group_sizes must be at least 1 each; got ", list_of(sizes));
  }
  for (const int64_t count : counts) {
    require(count >= 0, "part_windows: group_counts must not be negative; got ", list_of(counts));
  }
  const auto shapes_in_groups = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  require(shapes_in_groups * 2 == static_cast<int64_t>(shapes.size()), "part_windows: group_sizes must add up to the ",
          shapes.size() / 2, " shapes of window_shapes; got ", list_of(sizes));
}

std::tuple<Tensor, Tensor, Tensor> part_windows(const Tensor& activation, int64_t height, int64_t width,
                                                const Sizes& window_shapes, const Sizes& group_sizes,
                                                const Sizes& group_counts, double iou_threshold) {
  require_map("part_windows", "activation", activation, ScalarType::Float);
  const int64_t batch = activation.size(0), h = activation.size(1), w = activation.size(2);
  require_positive("part_windows", "height", height);
  require_positive("part_windows", "width", width);
  require_groups(window_shapes, group_sizes, group_counts, h, w);
  require(iou_threshold >= 0 && iou_threshold <= 1, "part_windows: iou_threshold must be in [0, 1]; got ",
          iou_threshold);

  const int64_t n = std::accumulate(group_counts.begin(), group_counts.end(), int64_t{0});
  const scaphoid_window_groups groups{window_shapes.data(), group_sizes.data(), group_counts.data(),
                                      static_cast<int64_t>(group_sizes.size()), iou_threshold};
  const Tensor maps = torch::stable::contiguous(activation);
  Tensor boxes = new_tensor(activation, {batch, n, 4}), scores = new_tensor(activation, {batch, n});
  Tensor margin = new_tensor(activation, {batch});
  const auto* from = maps.const_data_ptr<float>();
  auto *box = boxes.mutable_data_ptr<float>(), *score = scores.mutable_data_ptr<float>();
  auto* distance = margin.mutable_data_ptr<float>();
  in_parallel(batch, 4, scaphoid_part_windows_workspace(h, w, &groups), [&](int64_t first, int64_t last, void* space) {
    scaphoid_part_windows_cpu(from + first * h * w, &groups, last - first, h, w, height, width, box + first * n * 4,
                              score + first * n, distance + first, space);
  });
  return {boxes, scores, margin};
}

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) { m.impl("part_windows", TORCH_BOX(&scaphoid::part_windows)); }

#include <numeric>
#include <tuple>

#include "../scaphoid_ops.h"
#include "checks.h"
#include "small_maps.h"
#ifdef SCAPHOID_CUDA
#include "cuda.h"
#endif

namespace scaphoid {
namespace {

constexpr int64_t kMaxWindows = 1 << 20;  // an image

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
  const auto given = static_cast<int64_t>(shapes.size() / 2);
  int64_t left = given, kept = 0;  // never past their limits, however large the numbers are
  for (const int64_t size : sizes) {
    require(size >= 1, "part_windows: group_sizes must be at least 1 each; got ", list_of(sizes));
    left = size <= left ? left - size : -1;
    if (left < 0) break;
  }
  require(left == 0, "part_windows: group_sizes must add up to the ", given, " shapes of window_shapes; got ",
          list_of(sizes));
  for (const int64_t count : counts) {
    require(count >= 0, "part_windows: group_counts must not be negative; got ", list_of(counts));
    require(count <= kMaxWindows && (kept += count) <= kMaxWindows,
            "part_windows: group_counts must add up to at most ", kMaxWindows, " windows; got ", list_of(counts));
  }
}

void check(const Tensor& activation, int64_t height, int64_t width, const Sizes& window_shapes,
           const Sizes& group_sizes, const Sizes& group_counts, double iou_threshold) {
  require_map("part_windows", "activation", activation, ScalarType::Float);
  require_positive("part_windows", "height", height);
  require_positive("part_windows", "width", width);
  require_groups(window_shapes, group_sizes, group_counts, activation.size(1), activation.size(2));
  require(iou_threshold >= 0 && iou_threshold <= 1, "part_windows: iou_threshold must be in [0, 1]; got ",
          iou_threshold);
}

// Dense input, new outputs, and the groups as the C interface takes them.
struct Call {
  Tensor maps;
  int64_t batch, h, w, n;
  Tensor boxes, scores, margin;
  scaphoid_window_groups groups;

  Call(const Tensor& activation, const Sizes& shapes, const Sizes& sizes, const Sizes& counts, double iou_threshold)
      : maps(torch::stable::contiguous(activation)),
        batch(activation.size(0)),
        h(activation.size(1)),
        w(activation.size(2)),
        n(std::accumulate(counts.begin(), counts.end(), int64_t{0})),
        boxes(new_tensor(activation, {batch, n, 4})),
        scores(new_tensor(activation, {batch, n})),
        margin(new_tensor(activation, {batch})),
        groups{shapes.data(), sizes.data(), counts.data(), static_cast<int64_t>(sizes.size()), iou_threshold} {}
};

std::tuple<Tensor, Tensor, Tensor> part_windows(const Tensor& activation, int64_t height, int64_t width,
                                                const Sizes& window_shapes, const Sizes& group_sizes,
                                                const Sizes& group_counts, double iou_threshold) {
  check(activation, height, width, window_shapes, group_sizes, group_counts, iou_threshold);
  Call call(activation, window_shapes, group_sizes, group_counts, iou_threshold);
  const auto* from = call.maps.const_data_ptr<float>();
  auto *box = call.boxes.mutable_data_ptr<float>(), *score = call.scores.mutable_data_ptr<float>();
  auto* distance = call.margin.mutable_data_ptr<float>();
  const int64_t cells = call.h * call.w, n = call.n;
  const size_t workspace_bytes = scaphoid_part_windows_workspace(call.h, call.w, &call.groups);
  in_parallel(call.batch, images_a_thread(cells), workspace_bytes, [&](int64_t first, int64_t last, void* workspace) {
    scaphoid_part_windows_cpu(from + first * cells, &call.groups, last - first, call.h, call.w, height, width,
                              box + first * n * 4, score + first * n, distance + first, workspace);
  });
  return {call.boxes, call.scores, call.margin};
}

#ifdef SCAPHOID_CUDA
std::tuple<Tensor, Tensor, Tensor> part_windows_cuda(const Tensor& activation, int64_t height, int64_t width,
                                                     const Sizes& window_shapes, const Sizes& group_sizes,
                                                     const Sizes& group_counts, double iou_threshold) {
  check(activation, height, width, window_shapes, group_sizes, group_counts, iou_threshold);
  require_small_map("part_windows", "activation", activation);
  require(window_shapes.size() <= 2 * SCAPHOID_MAX_SHAPES, "part_windows: window_shapes must be at most ",
          SCAPHOID_MAX_SHAPES, " shapes on CUDA; got ", window_shapes.size() / 2);
  require(group_sizes.size() <= SCAPHOID_MAX_GROUPS, "part_windows: group_sizes must name at most ",
          SCAPHOID_MAX_GROUPS, " groups on CUDA; got ", group_sizes.size());
  const auto kept = std::accumulate(group_counts.begin(), group_counts.end(), int64_t{0});
  require(kept <= SCAPHOID_MAX_WINDOWS, "part_windows: group_counts must add up to at most ", SCAPHOID_MAX_WINDOWS,
          " windows on CUDA; got ", list_of(group_counts));
  const OnDevice device(activation);
  Call call(activation, window_shapes, group_sizes, group_counts, iou_threshold);
  require_launched(
      "part_windows",
      scaphoid_part_windows_cuda(call.maps.const_data_ptr<float>(), &call.groups, call.batch, call.h, call.w, height,
                                 width, call.boxes.mutable_data_ptr<float>(), call.scores.mutable_data_ptr<float>(),
                                 call.margin.mutable_data_ptr<float>(), device.stream()));
  return {call.boxes, call.scores, call.margin};
}
#endif

}  // namespace
}  // namespace scaphoid

STABLE_TORCH_LIBRARY_IMPL(scaphoid, CPU, m) { m.impl("part_windows", TORCH_BOX(&scaphoid::part_windows)); }
#ifdef SCAPHOID_CUDA
STABLE_TORCH_LIBRARY_IMPL(scaphoid, CUDA, m) { m.impl("part_windows", TORCH_BOX(&scaphoid::part_windows_cuda)); }
#endif

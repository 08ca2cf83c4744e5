// part_windows through the C interface, without torch: CUDA (under the SIMT executor) against the CPU bit for bit,
// boxes inside the image, over awkward sizes, groups, thresholds, ties, values that are not finite, and schedules. Says
// what differs; exit 0 if nothing does.
#include <cmath>

#include "checks.h"
#include "scaphoid_ops.h"

namespace {

void check(int number) {
  const int64_t batch = draw(0, 2), h = number % 12 ? draw(1, 15) : draw(33, 64), w = number % 9 ? draw(1, 15) : 63;
  const int64_t height = draw(1, 500), width = draw(1, 500);
  std::vector<int64_t> shapes, sizes, counts;
  int64_t n = 0;
  for (int group = draw(0, 3); group > 0; --group) {
    sizes.push_back(draw(1, 3));
    counts.push_back(draw(0, 4));
    n += counts.back();
    for (int64_t s = 0; s < sizes.back(); ++s) {
      shapes.push_back(draw(1, static_cast<int>(h)));
      shapes.push_back(draw(1, static_cast<int>(w)));
    }
  }
  const double thresholds[] = {0, 0.2, 0.25, 1.0 / 3, 0.5, 1};
  const scaphoid_window_groups groups{shapes.data(), sizes.data(), counts.data(), static_cast<int64_t>(sizes.size()),
                                      thresholds[draw(0, 5)]};
  const std::string name = "part_windows" + text(batch, h, w, height, width, n, groups.iou_threshold);
  std::vector<float> map;
  const int levels = draw(0, 3);  // few: ties and constant maps are common
  for (int64_t i = 0; i < batch * h * w; ++i) map.push_back(static_cast<float>(draw(-levels, levels)) * 0.1F);
  const float odd[] = {NAN, INFINITY, -INFINITY, 3e38F};
  if (number % 5 == 0 && batch > 0) map[draw(0, static_cast<int>(h * w) - 1)] = odd[draw(0, 3)];

  std::vector<float> boxes(batch * n * 4, -7), scores(batch * n, -7), margin(batch, -7);
  std::vector<float> cuda_boxes(boxes), cuda_scores(scores), cuda_margin(margin);
  std::vector<double> workspace = used_workspace(scaphoid_part_windows_workspace(h, w, &groups));
  scaphoid_part_windows_cpu(map.data(), &groups, batch, h, w, height, width, boxes.data(), scores.data(), margin.data(),
                            workspace.data());
  const int error = scaphoid_part_windows_cuda(map.data(), &groups, batch, h, w, height, width, cuda_boxes.data(),
                                               cuda_scores.data(), cuda_margin.data(), nullptr);
  expect(error == 0, name + ": launch returned" + text(error));
  expect(same(boxes, cuda_boxes), name + ": boxes on CUDA differ from those on the CPU");
  expect(same(scores, cuda_scores), name + ": scores on CUDA differ from those on the CPU");
  expect(same(margin, cuda_margin), name + ": margins on CUDA differ from those on the CPU");
  for (int64_t i = 0; i < batch * n; ++i) {
    const float* box = &boxes[4 * i];
    expect(0 <= box[0] && box[0] < box[2] && box[2] <= static_cast<float>(width) && 0 <= box[1] && box[1] < box[3] &&
               box[3] <= static_cast<float>(height),
           name + ": a box is empty or leaves the image");
  }
  for (const float each : margin) expect(each >= 0 && each <= 2, name + ": a margin is out of its range");
}

// More than CUDA's tables hold.
void check_limits() {
  const std::vector<int64_t> shapes(2 * (SCAPHOID_MAX_SHAPES + 1), 1), ones(SCAPHOID_MAX_GROUPS + 1, 1);
  const int64_t many_shapes = SCAPHOID_MAX_SHAPES + 1, one = 1, many_windows = SCAPHOID_MAX_WINDOWS + 1;
  const scaphoid_window_groups too_many[] = {{shapes.data(), &many_shapes, &one, 1, 0},
                                             {shapes.data(), ones.data(), ones.data(), SCAPHOID_MAX_GROUPS + 1, 0},
                                             {shapes.data(), &one, &many_windows, 1, 0}};
  float out[4 * (SCAPHOID_MAX_WINDOWS + 1)] = {};
  for (const auto& groups : too_many) {
    expect(scaphoid_part_windows_cuda(out, &groups, 1, 1, 1, 8, 8, out, out, out, nullptr) != 0,
           "part_windows: groups beyond the limits launch");
  }
}

}  // namespace

int main() {
  for (int number = 0; number < 48; ++number) check(number);
  check_limits();
  return failures != 0;
}

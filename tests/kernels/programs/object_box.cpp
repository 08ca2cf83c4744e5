// object_box through the C interface, without torch: CUDA (under the SIMT executor) against the CPU bit for bit, boxes
// inside the image, over awkward sizes, ties, winding components, values that are not finite, and schedules. Says what
// differs; exit 0 if nothing does.
#include <cmath>

#include "checks.h"
#include "scaphoid_ops.h"

namespace {

// Walls that leave one corridor: a component that no sweep from one side labels.
float maze(int64_t r, int64_t c, int64_t h) {
  if (c % 2 == 0) return 1;
  return r == (c % 4 == 1 ? h - 1 : 0) ? 1 : 0;
}

void check(int number) {
  const int64_t batch = draw(0, 3), h = number % 8 ? draw(1, 17) : draw(33, 64), w = number % 6 ? draw(1, 17) : 64;
  const int64_t height = draw(1, 500), width = draw(1, 500);
  const int levels = draw(0, 3);  // few: ties and constant maps are common
  const std::string name = "object_box" + text(batch, h, w, height, width);
  std::vector<float> maps[2];
  for (auto& map : maps) {
    for (int64_t i = 0; i < batch * h * w; ++i) {
      const bool winds = number % 5 == 1 && &map == maps;
      map.push_back(winds ? maze(i / w % h, i % w, h) : static_cast<float>(draw(-levels, levels)) * 0.1F);
    }
  }
  const float odd[] = {NAN, INFINITY, -INFINITY, 3e38F};
  std::vector<float>& spoilt = maps[number % 2];
  if (number % 5 == 0 && batch > 0) spoilt[draw(0, static_cast<int>(h * w) - 1)] = odd[draw(0, 3)];

  std::vector<float> boxes(batch * 4, -7), margin(batch, -7), cuda_boxes(boxes), cuda_margin(margin);
  std::vector<double> workspace = used_workspace(scaphoid_object_box_workspace(h, w));
  scaphoid_object_box_cpu(maps[0].data(), maps[1].data(), batch, h, w, height, width, boxes.data(), margin.data(),
                          workspace.data());
  const int error = scaphoid_object_box_cuda(maps[0].data(), maps[1].data(), batch, h, w, height, width,
                                             cuda_boxes.data(), cuda_margin.data(), nullptr);
  expect(error == 0, name + ": launch returned" + text(error));
  expect(same(boxes, cuda_boxes), name + ": boxes on CUDA differ from those on the CPU");
  expect(same(margin, cuda_margin), name + ": margins on CUDA differ from those on the CPU");
  for (int64_t b = 0; b < batch; ++b) {
    const float* box = &boxes[4 * b];
    expect(0 <= box[0] && box[0] < box[2] && box[2] <= static_cast<float>(width) && 0 <= box[1] && box[1] < box[3] &&
               box[3] <= static_cast<float>(height),
           name + ": a box is empty or leaves the image");
    expect(margin[b] >= 0 && margin[b] <= 2, name + ": a margin is out of its range");
  }
}

}  // namespace

int main() {
  for (int number = 0; number < 48; ++number) check(number);
  float map[65] = {};
  expect(scaphoid_object_box_cuda(map, map, 1, 1, 65, 8, 8, map, map, nullptr) != 0, "object_box: 65 columns launch");
  return failures != 0;
}

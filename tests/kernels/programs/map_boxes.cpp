// map_boxes through the C interface, without torch: CUDA (under the SIMT executor) against the CPU bit for bit, boxes
// inside the original, over awkward sizes, ties, values that are not finite, and schedules. Says what differs; exit 0
// if nothing does.
#include <cmath>

#include "checks.h"
#include "scaphoid_ops.h"

namespace {

void push_box(std::vector<float>& boxes, int64_t height, int64_t width) {
  std::uniform_real_distribution<float> start(0, 0.5F), end(0.6F, 1);
  const auto h = static_cast<float>(height), w = static_cast<float>(width);
  for (const float side : {w, h}) boxes.push_back(start(random_numbers) * side);
  for (const float side : {w, h}) boxes.push_back(end(random_numbers) * side);
}

void check(int number) {
  const int64_t batch = draw(0, 70), n = draw(0, 9), height = draw(1, 500), width = draw(1, 500);
  const double gammas[] = {1e-3, 0.5, 1};
  const double gamma = gammas[draw(0, 2)];
  const std::string name = "map_boxes" + text(batch, n, height, width, gamma);
  std::vector<float> boxes, scores, objects;
  std::vector<int32_t> sizes;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < n; ++i) {
      push_box(boxes, height, width);
      scores.push_back(static_cast<float>(draw(0, 4)));  // few: ties are common
    }
    push_box(objects, height, width);
    sizes.insert(sizes.end(), {draw(1, 4000), draw(1, 4000)});
  }
  const float odd[] = {NAN, INFINITY, -INFINITY};
  if (number % 3 == 0 && !scores.empty()) scores[draw(0, static_cast<int>(scores.size()) - 1)] = odd[draw(0, 2)];
  const bool finite = number % 5 != 0;
  if (!finite && !boxes.empty()) boxes[draw(0, static_cast<int>(boxes.size()) - 1)] = odd[draw(0, 2)];

  std::vector<float> mapped(batch * 4, -7), cuda_mapped(mapped);
  scaphoid_map_boxes_cpu(boxes.data(), scores.data(), gamma, objects.data(), sizes.data(), batch, n, height, width,
                         mapped.data());
  const int error = scaphoid_map_boxes_cuda(boxes.data(), scores.data(), gamma, objects.data(), sizes.data(), batch, n,
                                            height, width, cuda_mapped.data(), nullptr);
  expect(error == 0, name + ": launch returned" + text(error));
  expect(same(mapped, cuda_mapped), name + ": boxes on CUDA differ from those on the CPU");
  for (int64_t b = 0; b < batch && finite; ++b) {
    const float *box = &mapped[4 * b], slack = 1e-3F;
    const auto h = static_cast<float>(sizes[2 * b]), w = static_cast<float>(sizes[2 * b + 1]);
    expect(-slack <= box[0] && box[0] < box[2] && box[2] <= w + slack && -slack <= box[1] && box[1] < box[3] &&
               box[3] <= h + slack,
           name + ": a box is empty or leaves the original");
  }
}

}  // namespace

int main() {
  for (int number = 0; number < 60; ++number) check(number);
  return failures != 0;
}

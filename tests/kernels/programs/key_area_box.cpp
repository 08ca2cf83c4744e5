// key_area_box through the C interface, without torch: CUDA (under the SIMT executor) against the CPU bit for bit,
// boxes inside the image, over awkward sizes, ties, values that are not finite, and schedules. Says what differs; exit
// 0 if nothing does.
#include <cmath>

#include "checks.h"
#include "scaphoid_ops.h"

namespace {

template <class Real>
void check(int number, scaphoid_dtype dtype) {
  const int64_t batch = draw(0, 4), h = number % 4 ? draw(1, 17) : draw(33, 64), w = number % 6 ? draw(1, 17) : 64;
  const int64_t height = draw(1, 500), width = draw(1, 500);
  const int levels = draw(0, 3);  // few: ties and constant maps are common
  const std::string name = "key_area_box" + text(batch, h, w, height, width, static_cast<int>(dtype));
  const auto values = [](int64_t count, auto value) {
    std::vector<Real> drawn(count);
    for (Real& each : drawn) each = static_cast<Real>(value());
    return drawn;
  };
  const auto normal = [&] { return std::normal_distribution<double>(0, number % 3 ? 1 : 30)(random_numbers); };
  std::vector<Real> activation = values(batch * h * w, [&] { return draw(-levels, levels); });
  std::vector<Real> width_weight = values(w, normal), height_weight = values(h, normal);
  std::vector<Real> width_bias = values(1, normal), height_bias = values(1, normal);
  const double odd[] = {NAN, INFINITY, -INFINITY, sizeof(Real) == 4 ? 3e38 : 1e308};
  const bool finite = number % 5 != 0;
  if (!finite && !activation.empty()) {
    activation[draw(0, static_cast<int>(activation.size()) - 1)] = static_cast<Real>(odd[draw(0, 3)]);
  }
  if (number % 11 == 0) height_bias[0] = static_cast<Real>(odd[draw(0, 2)]);

  std::vector<Real> boxes(batch * 4, Real(-7)), margin(batch, Real(-7)), cuda_boxes(boxes), cuda_margin(margin);
  std::vector<double> workspace = used_workspace(scaphoid_key_area_box_workspace(h, w));
  scaphoid_key_area_box_cpu(dtype, activation.data(), width_weight.data(), width_bias.data(), height_weight.data(),
                            height_bias.data(), batch, h, w, height, width, boxes.data(), margin.data(),
                            workspace.data());
  const int error = scaphoid_key_area_box_cuda(dtype, activation.data(), width_weight.data(), width_bias.data(),
                                               height_weight.data(), height_bias.data(), batch, h, w, height, width,
                                               cuda_boxes.data(), cuda_margin.data(), nullptr);
  expect(error == 0, name + ": launch returned" + text(error));
  expect(same(boxes, cuda_boxes), name + ": boxes on CUDA differ from those on the CPU");
  expect(same(margin, cuda_margin), name + ": margins on CUDA differ from those on the CPU");
  for (int64_t b = 0; b < batch; ++b) {
    const Real* box = &boxes[4 * b];
    expect(0 <= box[0] && box[0] <= box[2] && box[2] <= static_cast<Real>(width) && 0 <= box[1] && box[1] <= box[3] &&
               box[3] <= static_cast<Real>(height),
           name + ": a box leaves the image");
    expect(margin[b] >= 0 && margin[b] <= 2, name + ": a margin is out of its range");
  }
}

}  // namespace

int main() {
  for (int number = 0; number < 60; ++number) {
    check<float>(number, SCAPHOID_F32);
    check<double>(number, SCAPHOID_F64);
  }
  return failures != 0;
}

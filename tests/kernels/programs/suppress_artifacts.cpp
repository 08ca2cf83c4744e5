// suppress_artifacts through the C interface, without torch: CUDA (under the SIMT executor), which settles most pixels
// in float, against the CPU, which decides in double, bit for bit: over awkward sizes, maps whose values lie on the
// threshold, extreme magnitudes, alignments and schedules. Says what differs; exit 0 if nothing does.
#include <cmath>

#include "checks.h"
#include "scaphoid_ops.h"

namespace {

void check(int number) {
  const int64_t batch = draw(0, 3), h = number % 5 ? draw(1, 15) : draw(50, 64), w = number % 7 ? draw(1, 15) : 64;
  const int64_t height = draw(1, 40), width = number % 3 == 0 ? 16 * draw(1, 40) : draw(1, 700);
  const double thetas[] = {0.6, 1, 0, 0.37, -0.5, 1e30, -1e300}, rs[] = {0.15, 0, 1, 0.5, 0.333};
  const double theta = thetas[draw(0, 9) % 7], r = rs[draw(0, 4)];
  const float scales[] = {1, 1e-38F, 1e-44F, 3e38F, 1e34F};
  const float scale = scales[number % 4 ? 0 : draw(0, 4)];
  const int64_t offset = draw(0, 3) ? 0 : draw(1, 15);  // bytes by which the images are off alignment
  const std::string name = "suppress_artifacts" + text(batch, h, w, height, width, theta, r, scale, offset);

  // Kinds: any, whole numbers (many values on the threshold), constant.
  const int kind = draw(0, 2);
  std::vector<float> activation(batch * h * w);
  for (float& cell : activation) {
    const float value = std::uniform_real_distribution<float>(-0.2F, 1)(random_numbers);
    cell = scale * (kind == 0 ? value : kind == 1 ? static_cast<float>(draw(0, 5)) / 5 : 0.7F);
  }
  const float odd[] = {NAN, INFINITY, -INFINITY};
  if (number % 6 == 0 && batch > 0) activation[draw(0, static_cast<int>(activation.size()) - 1)] = odd[draw(0, 2)];

  const int64_t pixels = batch * height * width;
  std::vector<uint8_t> memory(pixels + 32), cpu(pixels, 0xA5), cpu_apart(cpu), cuda_memory(pixels + 32, 0xA5);
  const auto aligned = [&](std::vector<uint8_t>& bytes) {
    return bytes.data() + (16 - reinterpret_cast<uintptr_t>(bytes.data()) % 16) % 16 + offset;
  };
  uint8_t *image = aligned(memory), *cuda = aligned(cuda_memory);
  for (int64_t i = 0; i < pixels; ++i) image[i] = static_cast<uint8_t>(draw(0, 255));

  std::vector<double> workspace = used_workspace(scaphoid_suppress_artifacts_workspace(width));
  const auto rows = [&](int64_t first, int64_t last, std::vector<uint8_t>& to) {
    scaphoid_suppress_artifacts_cpu(image, activation.data(), h, w, height, width, theta, r, first, last, to.data(),
                                    workspace.data());
  };
  rows(0, batch * height, cpu);
  rows(batch * height / 3, batch * height, cpu_apart);
  rows(0, batch * height / 3, cpu_apart);
  expect(same(cpu, cpu_apart), name + ": rows done apart differ");
  const int error =
      scaphoid_suppress_artifacts_cuda(image, activation.data(), batch, h, w, height, width, theta, r, cuda, nullptr);
  expect(error == 0, name + ": launch returned" + text(error));
  expect(pixels == 0 || std::memcmp(cpu.data(), cuda, pixels) == 0, name + ": CUDA differs from the CPU");
  for (const uint8_t* byte = cuda_memory.data(); byte != cuda; ++byte) {
    expect(*byte == 0xA5, name + ": CUDA wrote in front of the image");
  }
  for (const uint8_t* byte = cuda + pixels; byte != cuda_memory.data() + cuda_memory.size(); ++byte) {
    expect(*byte == 0xA5, name + ": CUDA wrote behind the image");
  }
}

}  // namespace

int main() {
  for (int number = 0; number < 84; ++number) check(number);
  return failures != 0;
}

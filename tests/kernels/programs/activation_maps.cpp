// activation_maps through the C interface, without torch: CPU and CUDA (under the SIMT executor) against sums in
// double, over awkward sizes, types, layouts and schedules; CUDA's bits the same in both layouts and in any batch. Says
// what differs; exit 0 if nothing does.
#include <cmath>

#include "checks.h"
#include "cpu/half.h"
#include "scaphoid_ops.h"

namespace scaphoid {  // beside those of the half types
namespace {

float load(float value) { return value; }
double load(double value) { return value; }
void store(float value, float* out) { *out = value; }
void store(float value, double* out) { *out = value; }

template <class Value>
std::vector<Value> draw_values(int64_t count) {
  std::vector<Value> values(count);
  for (Value& value : values) store(std::normal_distribution<float>()(random_numbers), &value);
  return values;
}

// [batch, channels, cells] -> [batch, cells, channels]
template <class Value>
std::vector<Value> channels_last(const scaphoid_features& of, const std::vector<Value>& planes) {
  const int64_t cells = of.h * of.w;
  std::vector<Value> moved(planes.size());
  for (int64_t i = 0; i < static_cast<int64_t>(planes.size()); ++i) {
    const int64_t b = i / (of.channels * cells), channel = i / cells % of.channels, cell = i % cells;
    moved[(b * cells + cell) * of.channels + channel] = planes[i];
  }
  return moved;
}

template <class Sum>
struct Maps {
  std::vector<Sum> activation, of_class;
  explicit Maps(int64_t cells) : activation(cells, Sum(-7)), of_class(cells, Sum(-7)) {}
  bool operator==(const Maps& other) const {
    return same(activation, other.activation) && same(of_class, other.of_class);
  }
};

template <class Value, class Weight, class Sum>
struct Case {
  scaphoid_features of;
  std::vector<Value> features, last;
  std::vector<Weight> weight;
  std::string name;

  Case(int number, scaphoid_dtype dtype, scaphoid_dtype weight_dtype) {
    of = {draw(0, 2), draw(1, 80), draw(1, 5), draw(1, 9), draw(1, number % 2 ? 2 : 8), dtype, weight_dtype, 0};
    if (number % 4 == 0) of.channels = 32 * draw(1, 9);
    if (number == 3) of.h = 31;  // more cells than a tile of the CPU
    features = draw_values<Value>(of.batch * of.channels * of.h * of.w);
    if (number % 5 == 0 && !features.empty()) {
      store(HUGE_VALF, &features[draw(0, static_cast<int>(features.size()) - 1)]);
      store(NAN, &features[draw(0, static_cast<int>(features.size()) - 1)]);
    }
    last = channels_last(of, features);
    weight = draw_values<Weight>(of.classes * of.channels);
    name = "activation_maps" +
           text(of.batch, of.channels, of.h, of.w, of.classes, static_cast<int>(dtype), static_cast<int>(weight_dtype));
  }

  int64_t cells() const { return of.batch * of.h * of.w; }

  Maps<Sum> cpu(bool in_cells, int64_t middle) const {
    scaphoid_features call = of;
    call.channels_last = in_cells;
    Maps<Sum> maps(cells());
    std::vector<double> workspace = used_workspace(scaphoid_activation_maps_workspace(&call));
    const auto run = [&](int64_t begin, int64_t end) {
      scaphoid_activation_maps_cpu(&call, in_cells ? last.data() : features.data(), weight.data(), begin, end,
                                   maps.activation.data(), maps.of_class.data(), workspace.data());
    };
    run(middle, cells());
    run(0, middle);
    return maps;
  }

  Maps<Sum> cuda(bool in_cells, int64_t first, int64_t batch) const {
    scaphoid_features call = of;
    call.channels_last = in_cells;
    call.batch = batch;
    Maps<Sum> maps(batch * of.h * of.w);
    const int64_t offset = first * of.channels * of.h * of.w;
    const int error = scaphoid_activation_maps_cuda(&call, (in_cells ? last : features).data() + offset, weight.data(),
                                                    maps.activation.data(), maps.of_class.data(), nullptr);
    expect(error == 0, name + ": launch returned" + text(error));
    return maps;
  }

  // Within what a sum of `channels` products in Sum may err.
  void check(const Maps<Sum>& maps, const std::string& who) const {
    const int64_t map = of.h * of.w;
    for (int64_t i = 0; i < cells(); ++i) {
      double sum = 0, size = 0, squares = 0, square_size = 0;
      for (int64_t k = -1; k < of.classes; ++k) {
        double total = 0, magnitude = 0;
        for (int64_t channel = 0; channel < of.channels; ++channel) {
          const double value = load(features[(i / map * of.channels + channel) * map + i % map]);
          const double product = k < 0 ? value : value * load(weight[k * of.channels + channel]);
          total += product;
          magnitude += std::fabs(product);
        }
        if (k < 0)
          sum = total, size = magnitude;
        else
          squares += total * total, square_size += magnitude * magnitude;
      }
      const double error = 40 * std::pow(2.0, sizeof(Sum) == 4 ? -24 : -53);
      const auto near = [&](double ours, double theirs, double scale) {
        if (!std::isfinite(theirs)) return std::isnan(theirs) ? std::isnan(ours) : !std::isfinite(ours);
        return std::fabs(ours - theirs) <= error * scale;
      };
      expect(near(maps.activation[i], sum, size), name + ": activation on " + who + " at" + text(i));
      expect(near(maps.of_class[i], std::sqrt(squares), std::sqrt(square_size)),
             name + ": class activation on " + who + " at" + text(i));
    }
  }

  void run() const {
    for (const bool in_cells : {false, true}) {
      const Maps<Sum> whole = cpu(in_cells, 0);
      check(whole, "CPU");
      expect(whole == cpu(in_cells, cells() / 3), name + ": cells done apart differ");
    }
    const Maps<Sum> device = cuda(false, 0, of.batch);
    check(device, "CUDA");
    bool finite = true;
    for (const Sum value : device.of_class) finite = finite && std::isfinite(value);
    if (!finite) return;  // NaN has many bit patterns
    expect(device == cuda(true, 0, of.batch), name + ": CUDA differs between layouts");
    if (of.batch == 0) return;
    const int64_t map = of.h * of.w, offset = (of.batch - 1) * map;
    const Maps<Sum> alone = cuda(false, of.batch - 1, 1);
    expect(std::memcmp(alone.of_class.data(), device.of_class.data() + offset, map * sizeof(Sum)) == 0,
           name + ": CUDA differs between batches");
  }
};

}  // namespace
}  // namespace scaphoid

int main() {
  using namespace scaphoid;
  for (int number = 0; number < 5; ++number) {
    Case<float, float, float>(number, SCAPHOID_F32, SCAPHOID_F32).run();
    Case<Half, float, float>(number, SCAPHOID_F16, SCAPHOID_F32).run();
    Case<Half, Half, float>(number, SCAPHOID_F16, SCAPHOID_F16).run();
    Case<BFloat16, float, float>(number, SCAPHOID_BF16, SCAPHOID_F32).run();
    Case<BFloat16, BFloat16, float>(number, SCAPHOID_BF16, SCAPHOID_BF16).run();
    Case<double, double, double>(number, SCAPHOID_F64, SCAPHOID_F64).run();
  }
  return failures != 0;
}

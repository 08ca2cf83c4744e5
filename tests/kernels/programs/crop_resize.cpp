// crop_resize and its backward through the C interface, without torch: half types, CPU against CUDA (under the SIMT
// executor) bit for bit, invariants, over awkward sizes, layouts, boxes and schedules. Says what differs; exit 0 if
// nothing does.
#include <cmath>

#include "checks.h"
#include "cpu/half.h"
#include "scaphoid_ops.h"

namespace {

using Bytes = std::vector<unsigned char>;

// Every half against its definition, and every rounding between two neighbours.
template <class Narrow>
void check_half(const char* name, int mantissa, int bias) {
  const uint32_t infinity = (2U * bias + 1U) << mantissa;
  const auto narrow = [](double value) {
    Narrow out;
    scaphoid::store(static_cast<float>(value), &out);
    return uint32_t{out.bits};
  };
  const auto widen = [](uint32_t bits) {
    return static_cast<double>(scaphoid::load(Narrow{static_cast<uint16_t>(bits)}));
  };
  for (uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const uint32_t magnitude = bits & 0x7FFFU, exponent = magnitude >> mantissa,
                   steps = magnitude & ((1U << mantissa) - 1U);
    const double sign = bits & 0x8000U ? -1 : 1, value = widen(bits);
    const std::string here = std::string(name) + " " + std::to_string(bits);
    if (magnitude > infinity) {
      expect(std::isnan(value) && (narrow(value) & 0x7FFFU) > infinity, here + " is not a number");
      continue;
    }
    const double exact = magnitude == infinity ? HUGE_VAL
                         : exponent == 0
                             ? std::ldexp(steps, 1 - bias - mantissa)
                             : std::ldexp(steps + (1U << mantissa), static_cast<int>(exponent) - bias - mantissa);
    expect(value == sign * exact && std::signbit(value) == (sign < 0), here + " widened is " + std::to_string(value));
    expect(narrow(value) == bits, here + " does not return from float");
    if (magnitude == infinity) continue;
    const double next = magnitude + 1 == infinity ? std::ldexp(1, bias + 1) : std::fabs(widen(magnitude + 1));
    const float half_way = static_cast<float>(sign * (exact + (next - exact) / 2));  // has one more bit: exact
    const uint32_t up = bits + 1, even = bits % 2 == 0 ? bits : up;
    expect(narrow(half_way) == even, here + ": the middle to the next does not round to even");
    expect(narrow(std::nextafterf(half_way, 0)) == bits, here + ": below the middle does not round down");
    expect(narrow(std::nextafterf(half_way, std::copysign(HUGE_VALF, half_way))) == up,
           here + ": above does not round up");
  }
}

struct Type {
  const char* name;
  scaphoid_dtype dtype;
  size_t bytes, real_bytes;  // of a pixel; of the boxes and of what the backward returns
};
constexpr Type kTypes[] = {{"uint8", SCAPHOID_U8, 1, 4},
                           {"float16", SCAPHOID_F16, 2, 4},
                           {"bfloat16", SCAPHOID_BF16, 2, 4},
                           {"float32", SCAPHOID_F32, 4, 4},
                           {"float64", SCAPHOID_F64, 8, 8}};

void put(const Type& type, double value, size_t at, Bytes& to) {
  unsigned char* out = to.data() + at * type.bytes;
  const auto single = static_cast<float>(value);
  switch (type.dtype) {
    case SCAPHOID_U8: *out = static_cast<unsigned char>(value); break;
    case SCAPHOID_F16: scaphoid::store(single, reinterpret_cast<scaphoid::Half*>(out)); break;
    case SCAPHOID_BF16: scaphoid::store(single, reinterpret_cast<scaphoid::BFloat16*>(out)); break;
    case SCAPHOID_F32: std::memcpy(out, &single, sizeof(single)); break;
    case SCAPHOID_F64: std::memcpy(out, &value, sizeof(value)); break;
  }
}

double get(const Type& type, const Bytes& from, size_t at) {
  const unsigned char* in = from.data() + at * type.bytes;
  float single = 0;
  double value = 0;
  switch (type.dtype) {
    case SCAPHOID_U8: return *in;
    case SCAPHOID_F16: return scaphoid::load(*reinterpret_cast<const scaphoid::Half*>(in));
    case SCAPHOID_BF16: return scaphoid::load(*reinterpret_cast<const scaphoid::BFloat16*>(in));
    case SCAPHOID_F32: std::memcpy(&single, in, sizeof(single)); return single;
    case SCAPHOID_F64: std::memcpy(&value, in, sizeof(value)); return value;
  }
  return value;
}

const Type& real_of(const Type& type) { return kTypes[type.real_bytes == 8 ? 4 : 3]; }

// Two results that must be the same numbers; NaN is the same as NaN, whatever its bits.
bool same(const Type& type, const Bytes& a, const Bytes& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size() / type.bytes; ++i) {
    const double x = get(type, a, i), y = get(type, b, i);
    if (x != y && !(std::isnan(x) && std::isnan(y))) return false;
  }
  return true;
}

bool close(const Type& type, const Bytes& a, const Bytes& b, double tolerance) {
  for (size_t i = 0; i < a.size() / type.bytes; ++i) {
    const double x = get(type, a, i), y = get(type, b, i);
    if (!(std::fabs(x - y) <= tolerance * (1 + std::fabs(x)))) return false;
  }
  return true;
}

struct Case {
  Type type;
  scaphoid_crops of;
  Bytes image, boxes, grad;
  bool whole_numbers;  // boxes and pixels are finite
  std::string name;
};

Bytes draw_boxes(const Type& type, const scaphoid_crops& of, bool special) {
  const Type& real = real_of(type);
  const double odd[] = {NAN, HUGE_VAL, -HUGE_VAL, 1e30, -1e30, 0, 16777216};
  Bytes boxes(of.batch * of.count * 4 * real.bytes);
  for (int64_t k = 0; k < of.batch * of.count * 4; ++k) {
    const int64_t side = k % 2 == 0 ? of.width : of.height;
    double edge = draw(-200, 1200) / 1000.0 * static_cast<double>(side);
    if (draw(0, 3) == 0) edge = draw(0, 1) * static_cast<double>(side);
    if (special && draw(0, 3) == 0) edge = odd[draw(0, 6)];
    put(real, edge, k, boxes);
  }
  return boxes;
}

Case draw_case(int number) {
  const Type& type = kTypes[number % 5];
  const bool special = number % 3 == 0 && type.dtype != SCAPHOID_U8;
  const int layout = draw(0, 3);
  scaphoid_crops of{draw(0, 2), draw(1, 3), draw(1, 37), draw(1, 45), 0, 0, 0, 0, draw(0, 8), draw(1, 35)};
  if (draw(0, 2) == 0) of.size = 4 * draw(1, 9);             // whole words
  if (number == 10) of.batch = of.count = 1, of.size = 133;  // several blocks across, of uint8
  if (number == 13) of.batch = of.count = 1, of.size = 259;  // several columns a thread
  of.column_stride = layout == 1 ? of.channels : layout == 2 ? of.height : layout == 3 ? 2 : 1;
  of.row_stride = layout == 1 ? of.width * of.channels : layout == 2 ? 1 : layout == 3 ? 2 * of.width + 3 : of.width;
  of.channel_stride = layout == 1 ? 1 : layout == 3 ? of.height * of.row_stride : of.height * of.width;
  of.batch_stride = of.channels * (layout == 3 ? of.channel_stride : of.height * of.width);
  Case it{type,     of,       Bytes(of.batch * of.batch_stride * type.bytes), draw_boxes(type, of, number % 3 == 0), {},
          !special, type.name};
  for (size_t k = 0; k < it.image.size() / type.bytes; ++k) {
    put(type, special && draw(0, 30) == 0 ? HUGE_VAL : draw(0, 255), k, it.image);
  }
  it.grad.resize(of.batch * of.count * of.channels * of.size * of.size * type.bytes);
  for (size_t k = 0; k < it.grad.size() / type.bytes; ++k) put(type, draw(-64, 64) / 64.0, k, it.grad);
  it.name += text(of.batch, of.channels, of.height, of.width, of.count, of.size) + " layout" + text(layout);
  return it;
}

void check_forward(const Case& it) {
  const int64_t rows = it.of.batch * it.of.count * it.of.size, middle = rows / 3;
  Bytes cpu(it.grad.size(), 0xA5), split(cpu), cuda(cpu);
  std::vector<double> workspace = used_workspace(scaphoid_crop_resize_workspace(&it.of));
  const auto run = [&](int64_t first, int64_t last, Bytes& to) {
    scaphoid_crop_resize_cpu(&it.of, it.type.dtype, it.image.data(), it.boxes.data(), first, last, to.data(),
                             workspace.data());
  };
  run(0, rows, cpu);
  run(middle, rows, split);
  run(0, middle, split);
  expect(cpu == split, it.name + ": rows done apart differ");
  const int error =
      scaphoid_crop_resize_cuda(&it.of, it.type.dtype, it.image.data(), it.boxes.data(), cuda.data(), nullptr);
  expect(error == 0, it.name + ": launch returned " + std::to_string(error));
  expect(same(it.type, cpu, cuda), it.name + ": CUDA differs from CPU");
  for (size_t k = 0; it.whole_numbers && k < cpu.size() / it.type.bytes; ++k) {
    const double value = get(it.type, cpu, k);
    if (!(value >= 0 && value <= 255)) return expect(false, it.name + ": a crop leaves the range of its image");
  }
}

struct Gradients {
  Bytes image, boxes;
};

Gradients run_cuda(const Case& it, bool deterministic) {
  const Type& real = real_of(it.type);
  Gradients to{Bytes(it.of.batch * it.of.channels * it.of.height * it.of.width * real.bytes, 0xA5),
               Bytes(it.boxes.size(), 0xA5)};
  std::vector<double> workspace = used_workspace(scaphoid_crop_resize_backward_cuda_workspace(&it.of));
  const int error =
      scaphoid_crop_resize_backward_cuda(&it.of, it.type.dtype, it.grad.data(), it.image.data(), it.boxes.data(),
                                         deterministic, to.image.data(), to.boxes.data(), workspace.data(), nullptr);
  expect(error == 0, it.name + ": backward launch returned " + std::to_string(error));
  return to;
}

void check_backward(const Case& it) {
  const Type& real = real_of(it.type);
  Gradients cpu{Bytes(it.of.batch * it.of.channels * it.of.height * it.of.width * real.bytes, 0xA5),
                Bytes(it.boxes.size(), 0xA5)};
  std::vector<double> workspace = used_workspace(scaphoid_crop_resize_backward_workspace(&it.of));
  scaphoid_crop_resize_backward_cpu(&it.of, it.type.dtype, it.grad.data(), it.image.data(), it.boxes.data(), 0,
                                    it.of.batch, cpu.image.data(), cpu.boxes.data(), workspace.data());
  const Gradients ordered = run_cuda(it, true), again = run_cuda(it, true), atomic = run_cuda(it, false);
  expect(same(real, cpu.image, ordered.image), it.name + ": the deterministic gradient differs from the CPU's");
  expect(ordered.image == again.image && ordered.boxes == again.boxes, it.name + ": not deterministic");
  const double tolerance = real.bytes == 8 ? 1e-12 : 1e-4;
  expect(close(real, cpu.image, atomic.image, tolerance), it.name + ": the atomic gradient differs from the CPU's");
  expect(same(real, ordered.boxes, atomic.boxes), it.name + ": the boxes' gradients differ between variants");
  if (!it.whole_numbers) return;
  expect(close(real, cpu.boxes, ordered.boxes, tolerance), it.name + ": the boxes' gradients differ from the CPU's");
  double given = 0, taken = 0;  // the weights of an output's pixels add up to 1
  for (size_t k = 0; k < it.grad.size() / it.type.bytes; ++k) given += get(it.type, it.grad, k);
  for (size_t k = 0; k < cpu.image.size() / real.bytes; ++k) taken += get(real, cpu.image, k);
  expect(std::fabs(given - taken) <= 1e-3 * (1 + std::fabs(given)), it.name + ": gradient is lost or made");
}

}  // namespace

int main() {
  check_half<scaphoid::Half>("float16", 10, 15);
  check_half<scaphoid::BFloat16>("bfloat16", 7, 127);
  for (int number = 0; number < 40; ++number) {
    const Case it = draw_case(number);
    check_forward(it);
    if (it.type.dtype != SCAPHOID_U8) check_backward(it);
  }
  return failures != 0;
}

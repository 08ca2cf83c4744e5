#include "crop.h"
#include "reduce.h"

namespace scaphoid {
namespace {

constexpr int kRowsPerBlock = 16;                                        // of a crop
constexpr int kTileWidth = 32, kTileHeight = kCropThreads / kTileWidth;  // of an image's pixels, a block each
constexpr int kRanges = kTileWidth + kTileHeight;
constexpr int kCropsAtOnce = kCropThreads / kRanges;

struct AddSlopes {
  __device__ BoxSlopes operator()(const BoxSlopes& a, const BoxSlopes& b) const {
    return {a.x + b.x, a.x_moment + b.x_moment, a.y + b.y, a.y_moment + b.y_moment};
  }
};

// A block reads kRowsPerBlock rows of a crop's gradient, all channels, a thread its columns of them. kScatter: adds to
// the image's gradient, which holds zeros. The block's share of the box's gradient goes to slopes[crop, blockIdx.y].
template <class Pixel, class Real, bool kScatter>
__global__ void __launch_bounds__(kCropThreads, 2)
    crop_gradients_kernel(Crops of, const Pixel* __restrict__ grads, const Pixel* __restrict__ images,
                          const Real* __restrict__ boxes, Real* __restrict__ grad_images, BoxSlopes* slopes) {
  const int crop = static_cast<int>(blockIdx.x), pixels = of.height * of.width;
  const Real* box = boxes + static_cast<int64_t>(crop) * 4;
  const Pixel* image = of.image_of(images, crop);
  const Pixel* grad = of.crop_at(grads, crop);
  Real* grad_image = grad_images + static_cast<int64_t>(crop / of.count) * (of.channels * pixels);
  const Real top = box[1], bottom = box[3];
  const int first = static_cast<int>(blockIdx.y) * kRowsPerBlock, last = min(first + kRowsPerBlock, of.size);
  BoxSlopes sum{};
  for (int j = static_cast<int>(threadIdx.x); j < of.size; j += kCropThreads) {
    const Sample<Real> x(box[0], box[2], j, of.size, of.width);
    const int low = x.low * of.column_stride, high = x.high * of.column_stride;
    for (int i = first; i < last; ++i) {
      const Sample<Real> y(top, bottom, i, of.size, of.height);
      for (int c = 0; c < of.channels; ++c) {
        const Pixel* upper = image + (c * of.channel_stride + y.low * of.row_stride);
        const Pixel* lower = image + (c * of.channel_stride + y.high * of.row_stride);
        const Real g = load(grad[(c * of.size + i) * of.size + j]);
        const Corners<Real> at{load(upper[low]), load(upper[high]), load(lower[low]), load(lower[high])};
        sum.add(g, at, x, y, i, j);
        if (kScatter) {
          Real* to_upper = grad_image + (c * pixels + y.low * of.width);
          Real* to_lower = grad_image + (c * pixels + y.high * of.width);
          atomicAdd(to_upper + x.low, g * (1 - y.weight) * (1 - x.weight));
          atomicAdd(to_upper + x.high, g * (1 - y.weight) * x.weight);
          atomicAdd(to_lower + x.low, g * y.weight * (1 - x.weight));
          atomicAdd(to_lower + x.high, g * y.weight * x.weight);
        }
      }
    }
  }
  SHARED_ARRAY(BoxSlopes, scratch, kCropThreads / kWarp);
  sum = block_reduce(sum, scratch, AddSlopes{});
  if (threadIdx.x == 0) slopes[static_cast<int64_t>(crop) * gridDim.y + blockIdx.y] = sum;
}

// One thread a crop adds its blocks' shares in order.
template <class Real>
__global__ void __launch_bounds__(kCropThreads, 2)
    box_gradients_kernel(int crops, int blocks, int size, const BoxSlopes* __restrict__ slopes,
                         Real* __restrict__ grad_boxes) {
  const int crop = static_cast<int>(blockIdx.x * kCropThreads + threadIdx.x);
  if (crop >= crops) return;
  BoxSlopes sum{};
  for (int k = 0; k < blocks; ++k) sum = AddSlopes{}(sum, slopes[static_cast<int64_t>(crop) * blocks + k]);
  sum.finish(size, grad_boxes + static_cast<int64_t>(crop) * 4);
}

// The outputs [begin, end) along an axis that may read a pixel.
struct Range {
  int begin, end;
};

// Positions rise or fall all along, so both ends are found by bisection.
template <class Real>
__device__ Range readers(Real start, Real end, int pixel, int size, int limit) {
  const bool falling = end < start;
  const auto first = [&](int low_at_least) {  // the first output past the pixels below (falling: above) that one
    int from = 0, to = size;
    while (from < to) {
      const int middle = from + (to - from) / 2, low = Sample<Real>(start, end, middle, size, limit).low;
      if (falling ? low < low_at_least : low >= low_at_least) {
        to = middle;
      } else {
        from = middle + 1;
      }
    }
    return from;
  };
  const int enter = first(pixel - 1), leave = first(pixel + 1);
  return falling ? Range{leave, enter} : Range{enter, leave};
}

// The image's gradient in the order of the CPU: a thread a pixel, over the crops and over the outputs that read it.
template <class Pixel, class Real>
__global__ void __launch_bounds__(kCropThreads, 2)
    gather_gradients_kernel(Crops of, int tiles_across, int tiles_an_image, const Pixel* __restrict__ grads,
                            const Real* __restrict__ boxes, Real* __restrict__ grad_images) {
  SHARED_ARRAY(Range, ranges, kCropsAtOnce * kRanges);
  const int thread = static_cast<int>(threadIdx.x);
  const int plane = static_cast<int>(blockIdx.x) / tiles_an_image, tile = static_cast<int>(blockIdx.x) % tiles_an_image;
  const int image = plane / of.channels, c = plane % of.channels;
  const int left = tile % tiles_across * kTileWidth, top = tile / tiles_across * kTileHeight;
  const int px = left + thread % kTileWidth, py = top + thread / kTileWidth;
  const Real* of_image = boxes + static_cast<int64_t>(image) * of.count * 4;
  Real sum = 0;
  for (int first = 0; first < of.count; first += kCropsAtOnce) {
    const int together = min(kCropsAtOnce, of.count - first);
    if (thread < together * kRanges) {
      const Real* box = of_image + (first + thread / kRanges) * 4;
      const int k = thread % kRanges;
      ranges[thread] = k < kTileWidth ? readers(box[0], box[2], left + k, of.size, of.width)
                                      : readers(box[1], box[3], top + (k - kTileWidth), of.size, of.height);
    }
    __syncthreads();
    for (int n = 0; n < together; ++n) {
      const Real* box = of_image + (first + n) * 4;
      const Pixel* grad = of.crop_at(grads, image * of.count + first + n) + c * of.size * of.size;
      const Range across = ranges[n * kRanges + thread % kTileWidth];
      const Range down = ranges[n * kRanges + kTileWidth + thread / kTileWidth];
      if (across.begin == across.end) continue;
      for (int i = down.begin; i < down.end; ++i) {
        const Sample<Real> y(box[1], box[3], i, of.size, of.height);
        for (int j = across.begin; j < across.end; ++j) {
          const Sample<Real> x(box[0], box[2], j, of.size, of.width);
          const Real g = load(grad[i * of.size + j]);
          if (y.low == py && x.low == px) sum += g * (1 - y.weight) * (1 - x.weight);
          if (y.low == py && x.high == px) sum += g * (1 - y.weight) * x.weight;
          if (y.high == py && x.low == px) sum += g * y.weight * (1 - x.weight);
          if (y.high == py && x.high == px) sum += g * y.weight * x.weight;
        }
      }
    }
    __syncthreads();
  }
  if (px < of.width && py < of.height) {
    grad_images[static_cast<int64_t>(plane) * (of.height * of.width) + py * of.width + px] = sum;
  }
}

template <class Pixel, class Real>
int launch(const scaphoid_crops& of, const void* grad, const void* image, const void* boxes, bool deterministic,
           void* grad_image, void* grad_boxes, void* workspace, void* stream) {
  const auto* from = static_cast<const Pixel*>(grad);
  const auto* pixels = static_cast<const Pixel*>(image);
  const auto* box = static_cast<const Real*>(boxes);
  auto* to = static_cast<Real*>(grad_image);
  auto* slopes = static_cast<BoxSlopes*>(workspace);
  const int64_t planes = to == nullptr ? 0 : of.batch * of.channels, crops = of.batch * of.count;
  if (planes > 0 && deterministic) {
    const int across = tiles(of.width, kTileWidth), an_image = across * tiles(of.height, kTileHeight);
    if (planes * an_image > INT32_MAX) return static_cast<int>(cudaErrorInvalidConfiguration);
    LAUNCH((gather_gradients_kernel<Pixel, Real>), static_cast<unsigned>(planes * an_image), kCropThreads, 0, stream,
           Crops(of), across, an_image, from, box, to);
  } else if (planes > 0) {
    const size_t bytes = planes * of.height * of.width * sizeof(Real);
    const cudaError_t error = cudaMemsetAsync(to, 0, bytes, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  const bool scatter = planes > 0 && !deterministic;  // sums up the boxes' gradients on its way
  if (crops > 0 && (scatter || grad_boxes != nullptr)) {
    const dim3 grid(static_cast<unsigned>(crops), tiles(of.size, kRowsPerBlock));
    if (scatter) {
      LAUNCH((crop_gradients_kernel<Pixel, Real, true>), grid, kCropThreads, 0, stream, Crops(of), from, pixels, box,
             to, slopes);
    } else {
      LAUNCH((crop_gradients_kernel<Pixel, Real, false>), grid, kCropThreads, 0, stream, Crops(of), from, pixels, box,
             to, slopes);
    }
  }
  if (crops > 0 && grad_boxes != nullptr) {
    LAUNCH((box_gradients_kernel<Real>), tiles(crops, kCropThreads), kCropThreads, 0, stream, static_cast<int>(crops),
           tiles(of.size, kRowsPerBlock), static_cast<int>(of.size), slopes, static_cast<Real*>(grad_boxes));
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace scaphoid

size_t scaphoid_crop_resize_backward_cuda_workspace(const scaphoid_crops* of) {
  using namespace scaphoid;
  return of->batch * of->count * tiles(of->size, kRowsPerBlock) * sizeof(BoxSlopes);
}

int scaphoid_crop_resize_backward_cuda(const scaphoid_crops* of, scaphoid_dtype dtype, const void* grad,
                                       const void* image, const void* boxes, int deterministic, void* grad_image,
                                       void* grad_boxes, void* workspace, void* stream) {
  using namespace scaphoid;
  const auto run = [&](auto launch_of_type) {
    return launch_of_type(*of, grad, image, boxes, deterministic != 0, grad_image, grad_boxes, workspace, stream);
  };
  switch (dtype) {
    case SCAPHOID_F16: return run(launch<__half, float>);
    case SCAPHOID_BF16: return run(launch<__nv_bfloat16, float>);
    case SCAPHOID_F32: return run(launch<float, float>);
    case SCAPHOID_F64: return run(launch<double, double>);
    case SCAPHOID_U8: break;  // whole numbers have no gradient
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

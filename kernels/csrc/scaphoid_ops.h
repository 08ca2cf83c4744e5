/* Plain C launch interface of the scaphoid ops: pointers and sizes, no torch.
 *
 * Arrays are dense and row-major unless strides are given. Boxes are (x0, y0, x1, y1), half-open, in pixels. No
 * function allocates, throws, keeps state or starts threads: a caller splits work by calling on disjoint slices, each
 * with its own workspace of the stated size in bytes (8-byte aligned). Arguments must already be valid: h, w, height,
 * width, size >= 1.
 */
#ifndef SCAPHOID_OPS_H
#define SCAPHOID_OPS_H

#include <stddef.h>
#include <stdint.h>

#define SCAPHOID_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Type of the pixels behind a void*. */
typedef enum { SCAPHOID_U8, SCAPHOID_F16, SCAPHOID_BF16, SCAPHOID_F32, SCAPHOID_F64 } scaphoid_dtype;

/* The GPU code in the library, such as "sm_80 sm_90 compute_90" (machine code for two, PTX for later ones); "" in a
 * library built without CUDA, which has no function whose name ends in _cuda. */
SCAPHOID_API const char* scaphoid_cuda_architectures(void);

/* Features [batch, channels, h, w] of `dtype` (not U8), dense: row-major, or [batch, h, w, channels] if channels_last;
 * weights of `weight_dtype`: F32 or `dtype`, F64 for F64. */
typedef struct {
  int64_t batch, channels, h, w;
  int64_t classes; /* 1 ... SCAPHOID_MAX_CLASSES */
  scaphoid_dtype dtype, weight_dtype;
  int channels_last;
} scaphoid_features;
#define SCAPHOID_MAX_CLASSES 8

/* Channel sum, and L2 norm over classes of weight . features, summed in float (F64: double) in a fixed order:
 * weight [classes, channels] -> activation, class_activation [batch, h, w], float (F64: double).
 * The CPU function writes cells [first, last) of the batch * h * w cells. */
SCAPHOID_API size_t scaphoid_activation_maps_workspace(const scaphoid_features* of);
SCAPHOID_API void scaphoid_activation_maps_cpu(const scaphoid_features* of, const void* features, const void* weight,
                                               int64_t first, int64_t last, void* activation, void* class_activation,
                                               void* workspace);
SCAPHOID_API int scaphoid_activation_maps_cuda(const scaphoid_features* of, const void* features, const void* weight,
                                               void* activation, void* class_activation, void* stream);

/* Bounding box of (largest 8-connected component of activation >= mean) and (class_activation >= mean).
 * activation, class_activation [batch, h, w] -> boxes [batch, 4], margin [batch].
 * CUDA: maps of at most SCAPHOID_MAX_SIDE cells a side. */
#define SCAPHOID_MAX_SIDE 64
SCAPHOID_API size_t scaphoid_object_box_workspace(int64_t h, int64_t w);
SCAPHOID_API void scaphoid_object_box_cpu(const float* activation, const float* class_activation, int64_t batch,
                                          int64_t h, int64_t w, int64_t height, int64_t width, float* boxes,
                                          float* margin, void* workspace);
SCAPHOID_API int scaphoid_object_box_cuda(const float* activation, const float* class_activation, int64_t batch,
                                          int64_t h, int64_t w, int64_t height, int64_t width, float* boxes,
                                          float* margin, void* stream);

/* Box around the peak of the two marginals, sized by one linear layer an axis.
 * activation [batch, h, w], width_weight [w], width_bias [1], height_weight [h], height_bias [1]
 * -> boxes [batch, 4], margin [batch], all F32 or all F64.
 * CUDA: maps of at most SCAPHOID_MAX_SIDE cells a side. */
SCAPHOID_API size_t scaphoid_key_area_box_workspace(int64_t h, int64_t w);
SCAPHOID_API void scaphoid_key_area_box_cpu(scaphoid_dtype dtype, const void* activation, const void* width_weight,
                                            const void* width_bias, const void* height_weight, const void* height_bias,
                                            int64_t batch, int64_t h, int64_t w, int64_t height, int64_t width,
                                            void* boxes, void* margin, void* workspace);
SCAPHOID_API int scaphoid_key_area_box_cuda(scaphoid_dtype dtype, const void* activation, const void* width_weight,
                                            const void* width_bias, const void* height_weight, const void* height_bias,
                                            int64_t batch, int64_t h, int64_t w, int64_t height, int64_t width,
                                            void* boxes, void* margin, void* stream);

/* Groups of window shapes; per group the best `counts` windows after greedy suppression. */
typedef struct {
  const int64_t* shapes; /* [sum of sizes, 2]: height, width in cells, each within the map */
  const int64_t* sizes;  /* [groups]: shapes per group */
  const int64_t* counts; /* [groups]: windows kept per group */
  int64_t groups;
  double iou_threshold; /* windows that overlap a pick by more are dropped */
} scaphoid_window_groups;

/* activation [batch, h, w] -> boxes [batch, n, 4], scores [batch, n], margin [batch], n = sum of counts.
 * CUDA: maps of at most SCAPHOID_MAX_SIDE cells a side, at most this many shapes, groups and windows in all. `groups`
 * lies in host memory and may go when the call returns. */
#define SCAPHOID_MAX_SHAPES 32
#define SCAPHOID_MAX_GROUPS 16
#define SCAPHOID_MAX_WINDOWS 64
SCAPHOID_API size_t scaphoid_part_windows_workspace(int64_t h, int64_t w, const scaphoid_window_groups* groups);
SCAPHOID_API void scaphoid_part_windows_cpu(const float* activation, const scaphoid_window_groups* groups,
                                            int64_t batch, int64_t h, int64_t w, int64_t height, int64_t width,
                                            float* boxes, float* scores, float* margin, void* workspace);
SCAPHOID_API int scaphoid_part_windows_cuda(const float* activation, const scaphoid_window_groups* groups,
                                            int64_t batch, int64_t h, int64_t w, int64_t height, int64_t width,
                                            float* boxes, float* scores, float* margin, void* stream);

/* What a crop reads and writes: image [batch, channels, height, width] with strides in elements, boxes [batch, count,
 * 4], crops [batch, count, channels, size, size] dense. height, width, size at most 2^24. Boxes, and the gradients that
 * leave the backward, are float32, for float64 images float64; half types are computed in float32, rounded once. */
typedef struct {
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
  int64_t count, size;
} scaphoid_crops;

/* Writes rows [first, last) of the batch * count * size rows of all crops (every channel of a row). */
SCAPHOID_API size_t scaphoid_crop_resize_workspace(const scaphoid_crops* of);
SCAPHOID_API void scaphoid_crop_resize_cpu(const scaphoid_crops* of, scaphoid_dtype dtype, const void* image,
                                           const void* boxes, int64_t first, int64_t last, void* crops,
                                           void* workspace);

/* Gradients of images [first, last), not for uint8: grad [batch, count, channels, size, size] of the image's dtype ->
 * grad_image [batch, channels, height, width] dense, grad_boxes [batch, count, 4]; null: that one is not wanted. */
SCAPHOID_API size_t scaphoid_crop_resize_backward_workspace(const scaphoid_crops* of);
SCAPHOID_API void scaphoid_crop_resize_backward_cpu(const scaphoid_crops* of, scaphoid_dtype dtype, const void* grad,
                                                    const void* image, const void* boxes, int64_t first, int64_t last,
                                                    void* grad_image, void* grad_boxes, void* workspace);

/* On CUDA, all crops and all images. What a kernel indexes must fit 32 bits: the offsets within an image, the elements
 * of a crop (all channels), batch * count. The backward adds to an image's pixels atomically, in no fixed order, or
 * deterministically in the order of the CPU, whose results it then equals; grad_boxes has a fixed order always. */
SCAPHOID_API int scaphoid_crop_resize_cuda(const scaphoid_crops* of, scaphoid_dtype dtype, const void* image,
                                           const void* boxes, void* crops, void* stream);
SCAPHOID_API size_t scaphoid_crop_resize_backward_cuda_workspace(const scaphoid_crops* of);
SCAPHOID_API int scaphoid_crop_resize_backward_cuda(const scaphoid_crops* of, scaphoid_dtype dtype, const void* grad,
                                                    const void* image, const void* boxes, int deterministic,
                                                    void* grad_image, void* grad_boxes, void* workspace, void* stream);

/* Writes rows [first, last) of the batch * height rows: image [batch, 1, height, width], activation [batch, h, w]. */
SCAPHOID_API size_t scaphoid_suppress_artifacts_workspace(int64_t width);
SCAPHOID_API void scaphoid_suppress_artifacts_cpu(const uint8_t* image, const float* activation, int64_t h, int64_t w,
                                                  int64_t height, int64_t width, double theta, double r, int64_t first,
                                                  int64_t last, uint8_t* suppressed, void* workspace);
/* All rows. Maps of at most SCAPHOID_MAX_SIDE cells a side, images of at most 2^31 - 1 pixels. */
SCAPHOID_API int scaphoid_suppress_artifacts_cuda(const uint8_t* image, const float* activation, int64_t batch,
                                                  int64_t h, int64_t w, int64_t height, int64_t width, double theta,
                                                  double r, uint8_t* suppressed, void* stream);

/* boxes [batch, n, 4] and object_boxes [batch, 4] in images of height x width, scores [batch, n], original_sizes
 * [batch, 2] (height, width) -> mapped [batch, 4] in original pixels. */
SCAPHOID_API void scaphoid_map_boxes_cpu(const float* boxes, const float* scores, double gamma,
                                         const float* object_boxes, const int32_t* original_sizes, int64_t batch,
                                         int64_t n, int64_t height, int64_t width, float* mapped);
SCAPHOID_API int scaphoid_map_boxes_cuda(const float* boxes, const float* scores, double gamma,
                                         const float* object_boxes, const int32_t* original_sizes, int64_t batch,
                                         int64_t n, int64_t height, int64_t width, float* mapped, void* stream);

#ifdef __cplusplus
}
#endif
#endif

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

/* Bounding box of (largest 8-connected component of activation >= mean) and (class_activation >= mean).
 * activation, class_activation [batch, h, w] -> boxes [batch, 4], margin [batch]. */
SCAPHOID_API size_t scaphoid_object_box_workspace(int64_t h, int64_t w);
SCAPHOID_API void scaphoid_object_box_cpu(const float* activation, const float* class_activation, int64_t batch,
                                          int64_t h, int64_t w, int64_t height, int64_t width, float* boxes,
                                          float* margin, void* workspace);

/* Box around the peak of the two marginals, sized by one linear layer an axis.
 * activation [batch, h, w], width_weight [w], width_bias [1], height_weight [h], height_bias [1]
 * -> boxes [batch, 4], margin [batch]. */
SCAPHOID_API size_t scaphoid_key_area_box_workspace(int64_t h, int64_t w);
SCAPHOID_API void scaphoid_key_area_box_cpu_f32(const float* activation, const float* width_weight,
                                                const float* width_bias, const float* height_weight,
                                                const float* height_bias, int64_t batch, int64_t h, int64_t w,
                                                int64_t height, int64_t width, float* boxes, float* margin,
                                                void* workspace);
SCAPHOID_API void scaphoid_key_area_box_cpu_f64(const double* activation, const double* width_weight,
                                                const double* width_bias, const double* height_weight,
                                                const double* height_bias, int64_t batch, int64_t h, int64_t w,
                                                int64_t height, int64_t width, double* boxes, double* margin,
                                                void* workspace);

/* Groups of window shapes; per group the best `counts` windows after greedy suppression. */
typedef struct {
  const int64_t* shapes; /* [sum of sizes, 2]: height, width in cells, each within the map */
  const int64_t* sizes;  /* [groups]: shapes per group */
  const int64_t* counts; /* [groups]: windows kept per group */
  int64_t groups;
  double iou_threshold; /* windows that overlap a pick by more are dropped */
} scaphoid_window_groups;

/* activation [batch, h, w] -> boxes [batch, n, 4], scores [batch, n], margin [batch], n = sum of counts. */
SCAPHOID_API size_t scaphoid_part_windows_workspace(int64_t h, int64_t w, const scaphoid_window_groups* groups);
SCAPHOID_API void scaphoid_part_windows_cpu(const float* activation, const scaphoid_window_groups* groups,
                                            int64_t batch, int64_t h, int64_t w, int64_t height, int64_t width,
                                            float* boxes, float* scores, float* margin, void* workspace);

/* What a crop reads and writes: image [batch, channels, height, width] with strides in elements, boxes [batch, count,
 * 4], crops [batch, count, channels, size, size] dense. */
typedef struct {
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
  int64_t count, size;
} scaphoid_crops;

/* Writes rows [first, last) of the batch * count * size rows of all crops (every channel of a row). */
SCAPHOID_API size_t scaphoid_crop_resize_workspace(int64_t size);
SCAPHOID_API void scaphoid_crop_resize_cpu_u8(const scaphoid_crops* of, const uint8_t* image, const float* boxes,
                                              int64_t first, int64_t last, uint8_t* crops, void* workspace);
SCAPHOID_API void scaphoid_crop_resize_cpu_f32(const scaphoid_crops* of, const float* image, const float* boxes,
                                               int64_t first, int64_t last, float* crops, void* workspace);
SCAPHOID_API void scaphoid_crop_resize_cpu_f64(const scaphoid_crops* of, const double* image, const double* boxes,
                                               int64_t first, int64_t last, double* crops, void* workspace);

/* Gradients of images [first, last): grad [batch, count, channels, size, size] -> grad_image [batch, channels, height,
 * width] dense, grad_boxes [batch, count, 4]. */
SCAPHOID_API void scaphoid_crop_resize_backward_cpu_f32(const scaphoid_crops* of, const float* grad, const float* image,
                                                        const float* boxes, int64_t first, int64_t last,
                                                        float* grad_image, float* grad_boxes);
SCAPHOID_API void scaphoid_crop_resize_backward_cpu_f64(const scaphoid_crops* of, const double* grad,
                                                        const double* image, const double* boxes, int64_t first,
                                                        int64_t last, double* grad_image, double* grad_boxes);

/* Writes rows [first, last) of the batch * height rows: image [batch, 1, height, width], activation [batch, h, w]. */
SCAPHOID_API size_t scaphoid_suppress_artifacts_workspace(int64_t width);
SCAPHOID_API void scaphoid_suppress_artifacts_cpu(const uint8_t* image, const float* activation, int64_t h, int64_t w,
                                                  int64_t height, int64_t width, double theta, double r, int64_t first,
                                                  int64_t last, uint8_t* suppressed, void* workspace);

/* boxes [batch, n, 4] and object_boxes [batch, 4] in images of height x width, scores [batch, n], original_sizes
 * [batch, 2] (height, width) -> mapped [batch, 4] in original pixels. */
SCAPHOID_API size_t scaphoid_map_boxes_workspace(int64_t n);
SCAPHOID_API void scaphoid_map_boxes_cpu(const float* boxes, const float* scores, double gamma,
                                         const float* object_boxes, const int32_t* original_sizes, int64_t batch,
                                         int64_t n, int64_t height, int64_t width, float* mapped, void* workspace);

#ifdef __cplusplus
}
#endif
#endif

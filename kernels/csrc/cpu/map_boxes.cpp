#include "../scaphoid_ops.h"
#include "windows.h"

void scaphoid_map_boxes_cpu(const float* boxes, const float* scores, double gamma, const float* object_boxes,
                            const int32_t* original_sizes, int64_t batch, int64_t n, int64_t height, int64_t width,
                            float* mapped) {
  const scaphoid::ScoredWindows windows(boxes, scores, gamma, object_boxes, original_sizes, n, height, width);
  for (int64_t b = 0; b < batch; ++b) {
    for (int side = 0; side < 4; ++side) mapped[b * 4 + side] = windows.mapped(b, side);
  }
}

// Limits of the ops that take an image's whole map at once.
#pragma once

#include "../scaphoid_ops.h"
#include "checks.h"

namespace scaphoid {

// Images a thread takes at least: about 0.1 ms of work, so that waking another one pays even on a busy machine.
inline int64_t images_a_thread(int64_t cells) { return cells < 65536 ? 65536 / cells : 1; }

// What CUDA takes: a map that fits a block's shared memory, an image a block.
inline void require_small_map(const char* op, const char* argument, const Tensor& map) {
  require(map.size(1) <= SCAPHOID_MAX_SIDE && map.size(2) <= SCAPHOID_MAX_SIDE, op, ": ", argument,
          " must have at most ", SCAPHOID_MAX_SIDE, " cells a side on CUDA; got ", described(map),
          ": move it to the CPU, which takes any size");
  require(map.size(0) <= INT32_MAX, op, ": ", argument, " must have at most 2^31 - 1 images on CUDA; got ",
          described(map));
}

}  // namespace scaphoid

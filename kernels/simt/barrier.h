// __syncthreads and its relatives: every thread of the block must come, and to the same one.
#pragma once

#include "place.h"

namespace simt {
// Number of threads whose predicate holds, once all have arrived.
int meet_block(const char* name, bool predicate, const Site& site);
}  // namespace simt

inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::meet_block("__syncthreads", true, site); }

inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::current()) {
  return simt::meet_block("__syncthreads_count", predicate != 0, site);
}

inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::current()) {
  return simt::meet_block("__syncthreads_or", predicate != 0, site) != 0;
}

inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::current()) {
  return simt::meet_block("__syncthreads_and", predicate == 0, site) == 0;
}

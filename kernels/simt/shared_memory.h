// Shared memory: fresh for every block, full of NaN, its ends guarded.
#pragma once

#include <cstddef>

#include "place.h"

namespace simt {

// The block's array of that key, which stands for a declaration; made for the first thread that asks.
void* shared_array(const void* key, const char* name, size_t bytes, const Site& site);
// The launch's dynamic shared memory, whatever its declarations call it.
void* dynamic_shared(const char* name, const Site& site);

// `Declaration` is a type of its own for every declaration, and for every instance of a template that it is in.
template <class T, size_t count, class Declaration>
T (&static_array(const char* name, Declaration, Site site = Site::current()))
[count] {
  static_assert(alignof(T) <= 16, "shared memory is aligned to 16 bytes");
  static const char key = 0;
  return *static_cast<T(*)[count]>(shared_array(&key, name, sizeof(T) * count, site));
}

template <class T>
T* dynamic_array(const char* name, Site site = Site::current()) {
  static_assert(alignof(T) <= 16, "shared memory is aligned to 16 bytes");
  return static_cast<T*>(dynamic_shared(name, site));
}

}  // namespace simt

// What the executor tells Address- and ThreadSanitizer; without them nothing of this does anything. Kernels are
// compiled for ThreadSanitizer, the executor is not (SIMT_THREAD_SANITIZER says so): to check its book-keeping would
// take most of the time.
#pragma once

#if defined(SIMT_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

// What a fiber did before publish(clock) happens before what another does after observe(clock).
struct alignas(8) Clock {  // ThreadSanitizer tells clocks apart by the eight bytes that they lie in
  char address;
};

#if defined(SIMT_THREAD_SANITIZER)

constexpr bool kThreadSanitizer = true;

// While one lives, what the fiber allocates, copies and fills is the executor's book-keeping, not the kernel's: no
// race.
class Unwatched {
 public:
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

inline void publish(Clock& clock) { __tsan_release(&clock); }
inline void observe(Clock& clock) { __tsan_acquire(&clock); }

#else

constexpr bool kThreadSanitizer = false;

class Unwatched {
 public:
  Unwatched() {}  // not trivial, so that one that only lives is no unused variable
};
inline void publish(Clock&) {}
inline void observe(Clock&) {}

#endif

}  // namespace simt

// Fibers: stacks of their own, between which one CPU thread switches. A fiber runs one CUDA thread after the other.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "context.h"
#include "sanitizers.h"

namespace simt {

class Fiber {
 public:
  explicit Fiber(void (*entry)());  // which must not return
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The first thing that `entry` does.
  static void entered();
  // From the CPU thread itself: runs the fiber until it suspends.
  void resume();
  // From the fiber: back to the CPU thread until it is resumed.
  void suspend();

 private:
  Context context_;
  char* stack_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* tsan_ = nullptr;        // ThreadSanitizer's
};

// To ThreadSanitizer, what a fiber did before is in order with what it does next: there, two blocks in a row, or as
// many as kMostForBlocks fibers run, get different fibers, so that they can race. More would cost time: every fiber
// knows how far all others have come, and takes a megabyte.
class Fibers {
 public:
  explicit Fibers(void (*entry)()) : entry_(entry) {}

  // For a new block: of `count`, one after the other.
  void start_block(size_t count);
  Fiber* next();
  // They are in the midst of something that nobody will end.
  void abandon() {
    fibers_.clear();
    next_ = 0;
  }

 private:
  static constexpr size_t kMostForBlocks = 1024;

  void (*const entry_)();
  std::vector<std::unique_ptr<Fiber>> fibers_;
  size_t next_ = 0;
};

}  // namespace simt

#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>

namespace simt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

// The CPU thread itself, to which fibers give way.
struct Home {
  Context context;
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* tsan = nullptr;
};
Home home;

// Below the stack lies a page that must not be touched: an overflow is a fault at once.
size_t guard_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

Fiber::Fiber(void (*entry)()) {
  void* memory = mmap(nullptr, guard_bytes() + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, guard_bytes(), PROT_NONE);
  stack_ = static_cast<char*>(memory) + guard_bytes();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // of a fiber that was abandoned
#elif defined(SIMT_THREAD_SANITIZER)
  tsan_ = __tsan_create_fiber(0);
#endif
  context_.prepare(stack_, kStackBytes, entry);
}

// ThreadSanitizer's fiber stays: one that was abandoned cannot be destroyed.
Fiber::~Fiber() { munmap(stack_ - guard_bytes(), guard_bytes() + kStackBytes); }

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &home.bottom, &home.bytes);
#endif
}

void Fiber::resume() {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, kStackBytes);
#elif defined(SIMT_THREAD_SANITIZER)
  home.tsan = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
  home.context.switch_to(context_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, home.bottom, home.bytes);
#elif defined(SIMT_THREAD_SANITIZER)
  __tsan_switch_to_fiber(home.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  context_.switch_to(home.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &home.bottom, &home.bytes);
#endif
}

void Fibers::start_block(size_t count) {
  const size_t most = kThreadSanitizer ? std::max(2 * count, kMostForBlocks) : count;
  if (next_ + count > most) next_ = 0;
}

Fiber* Fibers::next() {
  if (next_ == fibers_.size()) fibers_.push_back(std::make_unique<Fiber>(entry_));
  return fibers_[next_++].get();
}

}  // namespace simt

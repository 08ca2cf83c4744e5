// Where a fiber stopped, and how to go on there.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

#if defined(__x86_64__)

// Puts what a call preserves on the stack, whose pointer goes to *from, and takes it from the stack `to`. The C
// library's swapcontext does the same, but asks the kernel about signals each time.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

class Context {
 public:
  // To enter a function, which must not return, on that stack.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    auto* const top = reinterpret_cast<void**>(stack + bytes);
    top[-1] = nullptr;  // where `entry` would return to
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // six registers
    pointer_ = top - 8;
  }

  void switch_to(Context& to) { switch_stacks(&pointer_, to.pointer_); }

 private:
  void* pointer_ = nullptr;
};

#else

class Context {
 public:
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }

  void switch_to(Context& to) { swapcontext(&context_, &to.context_); }

 private:
  ucontext_t context_;
};

#endif

}  // namespace simt

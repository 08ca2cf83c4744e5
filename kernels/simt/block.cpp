// The block that runs, and what its threads do to wait, to go on and to fail.
#include "block.h"

#include <cstdio>
#include <string_view>

#include "atomics.h"

namespace simt {

Place place;
Block* block = nullptr;
std::mt19937_64 random_order{[] {
  const char* seed = std::getenv("SCAPHOID_SIMT_SEED");
  return seed != nullptr ? std::strtoull(seed, nullptr, 10) : 0;
}()};

bool same_site(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::string_view(a.file_name()) == b.file_name();
}

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string text(const Site& site) { return std::string(site.file_name()) + ":" + std::to_string(site.line()); }

std::string text(const Thread& thread) {
  return "thread " + text(thread.index) + " (warp " + std::to_string(thread.warp()) + ", lane " +
         std::to_string(thread.lane()) + ")";
}

std::string hex(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

void fail(const std::string& what, const Site& site) {
  block->failure = what + "\n  at " + text(site) + ", block " + text(block->index) + ", " + text(*block->current);
  throw Failed{};
}

void wait(const char* at, const Site& site, unsigned mask) {
  Thread& self = *block->current;
  self.waits_at = at;
  self.site = site;
  self.mask = mask;
  block->current->fiber->suspend();
}

void wake(Thread& thread) {
  thread.waits_at = nullptr;
  block->ready.push_back(&thread);
}

void maybe_yield() {
  const Unwatched unwatched;
  if (random_order() % 4 != 0) return;
  wake(*block->current);
  block->current->fiber->suspend();
}

}  // namespace simt

// A thread block while it runs: its threads, which of them may go on, and what they meet at. For the executor alone.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "place.h"

namespace simt {

constexpr unsigned kWarpSize = 32;

// A CUDA thread and what it waits for.
struct Thread {
  Fiber* fiber = nullptr;
  uint3 index{};
  unsigned number = 0;  // within the block
  bool exited = false;
  const char* waits_at = nullptr;  // null: it does not wait
  Site site{};
  unsigned mask = 0;  // of lanes that it waits for; 0: for the block

  unsigned lane() const { return number % kWarpSize; }
  unsigned warp() const { return number / kWarpSize; }
};

// What threads meet at comes in two, used in turn: a fast thread may be at the next meeting, though not at the one
// after it, before the slow ones have left.
template <class Meeting>
struct Meetings {
  Meeting of[2]{};
  unsigned turn = 0;

  Meeting& current() { return of[turn % 2]; }
};

struct BlockMeeting {
  unsigned arrived = 0;
  int count = 0;  // threads whose predicate holds
  Site site{};    // of the first to arrive
  Clock clock{};
};

struct WarpMeeting {
  unsigned arrived = 0;             // lanes
  uint64_t values[kWarpSize] = {};  // what each lane brings
  const char* operation = nullptr;  // of the first to arrive, as the following
  Site site{};
  int width = 0;
  Clock clock{};
};

struct Lanes {
  unsigned mask;
  Meetings<WarpMeeting> meetings;
};

struct Warp {
  unsigned present = 0, exited = 0;  // lanes
  std::list<Lanes> lanes;            // a list: meetings keep their addresses
};

struct SharedArray {
  const void* key;  // stands for its declaration
  const char* name;
  size_t bytes;
  std::unique_ptr<char, void (*)(void*)> memory;
};

struct Block {
  uint3 index{};
  size_t dynamic_bytes = 0, shared_limit = 0;
  std::vector<Thread> threads;
  std::vector<Thread*> ready;
  unsigned exited = 0;
  Thread* current = nullptr;
  Meetings<BlockMeeting> meetings;
  std::vector<Warp> warps;
  std::list<SharedArray> shared;
  std::string failure;
};

extern Block* block;                  // that runs now
extern std::mt19937_64 random_order;  // of blocks and threads

bool same_site(const Site& a, const Site& b);
std::string text(const uint3& extent);
std::string text(const Site& site);
std::string text(const Thread& thread);
std::string hex(unsigned mask);

// Ends the launch from within the kernel: what is wrong, where, and for whom.
struct Failed {};
[[noreturn]] void fail(const std::string& what, const Site& site);

// The current thread waits until someone wakes it.
void wait(const char* at, const Site& site, unsigned mask);
void wake(Thread& thread);

// Bytes of shared memory that the kernel may have.
size_t dynamic_limit(const void* kernel);
// Name of a shared array of the block behind whose end something was written, or null.
const char* overrun();
void set_error(int error, const std::string& message);

}  // namespace simt

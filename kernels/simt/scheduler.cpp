// Runs launches: their blocks one after the other, the threads of a block in turns.
#include <algorithm>
#include <numeric>

#include "block.h"
#include "launch.h"
#include "runtime.h"

namespace simt {

namespace {

const Launch* running = nullptr;
Clock started, done;  // of what came before the launch; of what threads did until they ended

// Whoever waits for the current thread waits in vain.
void exit_thread() {
  const Unwatched unwatched;
  Thread& self = *block->current;
  self.exited = true;
  ++block->exited;
  block->warps[self.warp()].exited |= 1U << self.lane();
  for (const Thread& other : block->threads) {
    if (other.waits_at == nullptr) continue;
    const bool for_block = other.mask == 0;
    if (!for_block && (other.warp() != self.warp() || !(other.mask >> self.lane() & 1))) continue;
    fail("a thread exits while " + text(other) + " waits for it at " + other.waits_at, other.site);
  }
}

// What a fiber does all its life.
void run_threads() {
  Fiber::entered();
  while (true) {
    observe(started);
    try {
      running->thread(running->call);
      exit_thread();
    } catch (const Failed&) {
    }
    publish(done);
    block->current->fiber->suspend();
  }
}

Fibers fibers(run_threads);

std::string describe_waiting() {
  std::string what = "nothing can go on";
  std::vector<Site> told;
  for (const Thread& thread : block->threads) {
    if (thread.waits_at == nullptr) continue;
    if (std::any_of(told.begin(), told.end(), [&](const Site& site) { return same_site(site, thread.site); })) continue;
    told.push_back(thread.site);
    what += "\n  " + text(thread) + " waits at " + thread.waits_at +
            (thread.mask != 0 ? " with mask " + hex(thread.mask) : "") + ", " + text(thread.site);
  }
  return what + "\n  in block " + text(block->index);
}

uint3 unravel(unsigned number, const dim3& extent) {
  return {number % extent.x, number / extent.x % extent.y, number / extent.x / extent.y};
}

size_t volume(const dim3& extent) { return size_t{extent.x} * extent.y * extent.z; }

void prepare_threads() {
  const size_t count = volume(running->block);
  fibers.start_block(count);
  block->threads.resize(count);
  block->warps.resize((count + kWarpSize - 1) / kWarpSize);
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    thread.number = static_cast<unsigned>(i);
    thread.index = unravel(thread.number, running->block);
    thread.fiber = fibers.next();
    block->warps[thread.warp()].present |= 1U << thread.lane();
    block->ready.push_back(&thread);
  }
}

// Runs the block until all threads have exited or one fails.
void run_block() {
  prepare_threads();
  auto& ready = block->ready;
  place.block = block->index;
  while (!ready.empty() && block->failure.empty()) {
    std::swap(ready[random_order() % ready.size()], ready.back());
    block->current = ready.back();
    ready.pop_back();
    place.thread = block->current->index;
    block->current->fiber->resume();
  }
  if (!block->failure.empty()) return;
  if (block->exited < block->threads.size()) {
    block->failure = describe_waiting();
  } else if (const char* name = overrun()) {
    block->failure = std::string("something was written behind the end of shared array ") + name + "\n  in block " +
                     text(block->index);
  }
}

// What CUDA refuses to launch, or null.
const char* refusal(const dim3& grid, const dim3& threads) {
  if (volume(threads) == 0) return "a block of no threads";
  if (threads.x > 1024 || threads.y > 1024 || volume(threads) > 1024) return "a block of more than 1024 threads";
  if (threads.z > 64) return "a block of more than 64 threads in z";
  if (volume(grid) == 0) return "a grid of no blocks";
  if (grid.x > 0x7FFFFFFFU || grid.y > 65535 || grid.z > 65535) return "a grid of more than 65535 blocks in y or z";
  return nullptr;
}

}  // namespace

void run(const Launch& launch) {
  const Unwatched unwatched;
  const std::string kernel = std::string("SIMT: kernel ") + launch.name + ": ";
  const std::string shape = ": grid " + text({launch.grid.x, launch.grid.y, launch.grid.z}) + ", block " +
                            text({launch.block.x, launch.block.y, launch.block.z});
  if (const char* why = refusal(launch.grid, launch.block)) {
    return set_error(cudaErrorInvalidConfiguration, kernel + "launch of " + why + shape);
  }
  const size_t limit = dynamic_limit(launch.kernel);
  if (launch.dynamic_bytes > limit) {
    return set_error(cudaErrorInvalidValue, kernel + "launch with " + std::to_string(launch.dynamic_bytes) +
                                                " bytes of dynamic shared memory, more than " + std::to_string(limit));
  }
  running = &launch;
  place.block_size = launch.block;
  place.grid_size = launch.grid;
  std::vector<unsigned> order(volume(launch.grid));
  std::iota(order.begin(), order.end(), 0U);
  std::shuffle(order.begin(), order.end(), random_order);
  publish(started);
  std::list<Block> blocks;
  for (const unsigned number : order) {
    if (!kThreadSanitizer) blocks.clear();  // to it, memory used again would look like blocks that wait for one another
    block = &blocks.emplace_back();
    block->index = unravel(number, launch.grid);
    block->dynamic_bytes = launch.dynamic_bytes;
    block->shared_limit = limit;
    run_block();
    if (!block->failure.empty()) {
      set_error(cudaErrorLaunchFailure, kernel + block->failure);
      fibers.abandon();
      break;
    }
  }
  block = nullptr;
  running = nullptr;
  observe(done);
}

}  // namespace simt

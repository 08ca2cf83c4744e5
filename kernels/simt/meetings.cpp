// Where threads wait for one another: barriers of the block, intrinsics of a warp.
#include <bit>

#include "barrier.h"
#include "block.h"
#include "warp.h"

namespace simt {
namespace {

std::string names(unsigned lanes) {
  std::string text = std::has_single_bit(lanes) ? "lane" : "lanes";
  for (; lanes != 0; lanes &= lanes - 1) text += " " + std::to_string(std::countr_zero(lanes));
  return text;
}

Thread& thread_of(unsigned warp, unsigned lanes) { return block->threads[warp * kWarpSize + std::countr_zero(lanes)]; }

Lanes& lanes_of(Warp& warp, unsigned mask) {
  for (Lanes& lanes : warp.lanes) {
    if (lanes.mask == mask) return lanes;
  }
  return warp.lanes.emplace_back(Lanes{mask, {}});
}

void check_mask(const char* name, unsigned mask, const Site& site) {
  const Thread& self = *block->current;
  const Warp& warp = block->warps[self.warp()];
  const auto refuse = [&](const std::string& why) { fail(std::string(name) + " with mask " + hex(mask) + why, site); };
  if (!(mask >> self.lane() & 1)) refuse(": the calling lane is not in it");
  if (const unsigned absent = mask & ~warp.present) refuse(": the block has no " + names(absent));
  if (const unsigned gone = mask & warp.exited) refuse(": " + names(gone) + " exited");
  // A lane of ours that waits for us with another mask will wait for ever.
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const Thread& other = thread_of(self.warp(), rest);
    if (other.waits_at == nullptr || other.mask == mask || !(other.mask >> self.lane() & 1)) continue;
    refuse(": lane " + std::to_string(other.lane()) + " waits with mask " + hex(other.mask) + ", " + text(other.site));
  }
}

// What the lanes of the mask brought, once all have arrived. `ordering`: what they did to memory before is in order
// with what they do next. CUDA promises that for __syncwarp, but not for shuffles, votes and matches.
const uint64_t* meet_warp(const char* name, unsigned mask, uint64_t value, int width, const Site& site,
                          bool ordering = false) {
  check_mask(name, mask, site);
  const Thread& self = *block->current;
  auto& meetings = lanes_of(block->warps[self.warp()], mask).meetings;
  auto& meeting = meetings.current();
  if (meeting.arrived == 0) {
    meeting.operation = name;
    meeting.site = site;
    meeting.width = width;
  } else if (!same_site(meeting.site, site)) {
    fail(std::string(name) + ": other lanes of mask " + hex(mask) + " are at " + meeting.operation + ", " +
             text(meeting.site),
         site);
  } else if (meeting.width != width) {
    fail(std::string(name) + " with width " + std::to_string(width) + ", on other lanes " +
             std::to_string(meeting.width),
         site);
  }
  meeting.values[self.lane()] = value;
  meeting.arrived |= 1U << self.lane();
  if (ordering) publish(meeting.clock);
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meetings.turn;
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) wake(thread_of(self.warp(), rest));
    wait(nullptr, site, mask);
  } else {
    wait(name, site, mask);
  }
  if (ordering) observe(meeting.clock);
  return meeting.values;
}

// Groups of `width` lanes: up and down, a lane keeps its own value where the other would be outside of its group; xor
// reads groups before its own, but not those after it.
int source_of(Shuffle kind, int lane, int by, int width) {
  const int first = lane & -width, last = first + width - 1;
  switch (kind) {
    case Shuffle::kIndex: return first + (by & (width - 1));
    case Shuffle::kUp: return by < 0 || by > lane - first ? lane : lane - by;
    case Shuffle::kDown: return by < 0 || by > last - lane ? lane : lane + by;
    case Shuffle::kXor: return (lane ^ by) < 0 || (lane ^ by) > last ? lane : lane ^ by;
  }
  return lane;
}

constexpr const char* kShuffles[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};

}  // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int by, int width, const Site& site) {
  const Unwatched unwatched;
  const char* const name = kShuffles[static_cast<int>(kind)];
  if (width < 1 || width > static_cast<int>(kWarpSize) || !std::has_single_bit(static_cast<unsigned>(width))) {
    fail(std::string(name) + " with width " + std::to_string(width) + ", which is not a power of two up to 32", site);
  }
  const int source = source_of(kind, static_cast<int>(block->current->lane()), by, width);
  const uint64_t* values = meet_warp(name, mask, bits, width, site);
  if (!(mask >> source & 1)) {
    fail(std::string(name) + " reads lane " + std::to_string(source) + ", which is not in its mask " + hex(mask), site);
  }
  return values[source];
}

unsigned ballot(const char* name, unsigned mask, bool predicate, const Site& site) {
  const Unwatched unwatched;
  const uint64_t* values = meet_warp(name, mask, predicate, 0, site);
  unsigned lanes = 0;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    if (values[std::countr_zero(rest)] != 0) lanes |= rest & -rest;
  }
  return lanes;
}

unsigned match(unsigned mask, uint64_t bits, const Site& site) {
  const Unwatched unwatched;
  const uint64_t* values = meet_warp("__match_any_sync", mask, bits, 0, site);
  unsigned lanes = 0;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    if (values[std::countr_zero(rest)] == bits) lanes |= rest & -rest;
  }
  return lanes;
}

void sync_warp(unsigned mask, const Site& site) {
  const Unwatched unwatched;
  meet_warp("__syncwarp", mask, 0, 0, site, true);
}

int meet_block(const char* name, bool predicate, const Site& site) {
  const Unwatched unwatched;
  auto& meetings = block->meetings;
  auto& meeting = meetings.current();
  if (block->exited > 0) fail(std::string(name) + " after threads of the block have exited", site);
  if (meeting.arrived == 0) {
    meeting.site = site;
    meeting.count = 0;
  } else if (!same_site(meeting.site, site)) {
    fail(std::string("divergent ") + name + ": other threads of the block wait at " + text(meeting.site), site);
  }
  meeting.count += predicate;
  publish(meeting.clock);
  if (++meeting.arrived == block->threads.size()) {
    meeting.arrived = 0;
    ++meetings.turn;
    for (Thread& thread : block->threads) wake(thread);
    wait(nullptr, site, 0);
  } else {
    wait(name, site, 0);
  }
  observe(meeting.clock);
  return meeting.count;
}

}  // namespace simt

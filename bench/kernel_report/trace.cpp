// The global memory accesses of kernels that run under the SIMT executor. Kernels are compiled with
// -fsanitize=thread, whose calls before every load and store end here instead of in ThreadSanitizer.
//
// A warp's threads that make the same access (the same place in the code for the same time) are one request, as on a
// GPU; it moves the 32-byte sectors that it touches. Blocks must run one after the other.
#include "trace.h"

#include <launch.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace {

constexpr uint64_t kSector = 32;
constexpr unsigned kWarpLanes = 32;

struct Buffer {
  uintptr_t begin, end;
  std::vector<bool> read, written;  // by sector
};

struct Totals {
  uint64_t requests = 0, sectors = 0, most_sectors = 0, needed_sectors = 0, distinct_sectors = 0;
  std::map<unsigned, uint64_t> by_width;  // bytes of an access -> accesses
};

struct Launch {
  std::string kernel;
  unsigned blocks, threads;
  size_t shared;
  Totals loads, stores;
};

// What one request of a warp touched.
struct Request {
  std::set<uint64_t> sectors;
  std::set<std::pair<uintptr_t, unsigned>> accesses;
};

std::vector<Buffer> buffers;
std::vector<Launch> launches;
bool tracing = false;
uint64_t block = UINT64_MAX;
std::set<uint64_t> finished;
std::unordered_map<uint64_t, uint32_t> times;                                 // thread and place -> accesses so far
std::map<std::tuple<unsigned, uintptr_t, uint32_t, bool>, Request> requests;  // warp, place, time, store

void finish_block() {
  for (const auto& [key, request] : requests) {
    Totals& totals = std::get<3>(key) ? launches.back().stores : launches.back().loads;
    uint64_t bytes = 0;
    for (const auto& access : request.accesses) bytes += access.second;
    totals.requests += 1;
    totals.sectors += request.sectors.size();
    totals.most_sectors = std::max<uint64_t>(totals.most_sectors, request.sectors.size());
    totals.needed_sectors += (bytes + kSector - 1) / kSector;
  }
  requests.clear();
  times.clear();
}

void enter_block(uint64_t number) {
  if (number == block) return;
  finish_block();
  if (!finished.insert(number).second) {
    std::fprintf(stderr, "trace: block %llu ran on after another one; run blocks one after the other\n",
                 static_cast<unsigned long long>(number));
    std::abort();
  }
  block = number;
}

void record(const void* pointer, unsigned bytes, bool store, void* place) {
  if (!tracing) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto buffer = std::find_if(buffers.begin(), buffers.end(),
                                   [&](const Buffer& each) { return address >= each.begin && address < each.end; });
  if (buffer == buffers.end()) return;  // shared memory, or the thread's own
  const uint64_t number = blockIdx.x + uint64_t{gridDim.x} * (blockIdx.y + uint64_t{gridDim.y} * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  enter_block(number);
  Totals& totals = store ? launches.back().stores : launches.back().loads;
  totals.by_width[bytes] += 1;
  const auto site = reinterpret_cast<uintptr_t>(place);
  const uint32_t time = times[site * 1024 + thread]++;
  Request& request = requests[{thread / kWarpLanes, site, time, store}];
  request.accesses.insert({address, bytes});
  std::vector<bool>& touched = store ? buffer->written : buffer->read;
  for (uint64_t sector = (address - buffer->begin) / kSector; sector * kSector < address + bytes - buffer->begin;
       ++sector) {
    request.sectors.insert(buffer->begin / kSector + sector);
    totals.distinct_sectors += !touched[sector];
    touched[sector] = true;
  }
}

std::string json(const Totals& totals) {
  std::string text = "{\"requests\": " + std::to_string(totals.requests) +
                     ", \"sectors\": " + std::to_string(totals.sectors) +
                     ", \"most_sectors\": " + std::to_string(totals.most_sectors) +
                     ", \"needed_sectors\": " + std::to_string(totals.needed_sectors) +
                     ", \"distinct_sectors\": " + std::to_string(totals.distinct_sectors) + ", \"by_width\": {";
  for (const auto& [width, count] : totals.by_width) {
    if (text.back() != '{') text += ", ";
    text += "\"" + std::to_string(width) + "\": " + std::to_string(count);
  }
  return text + "}}";
}

}  // namespace

extern "C" {

void trace_begin(const char* kernel, unsigned blocks, unsigned threads, size_t shared) {
  launches.push_back({kernel, blocks, threads, shared, {}, {}});
  for (Buffer& buffer : buffers) {
    std::fill(buffer.read.begin(), buffer.read.end(), false);
    std::fill(buffer.written.begin(), buffer.written.end(), false);
  }
  finished.clear();
  block = UINT64_MAX;
  tracing = true;
}

void trace_end() {
  finish_block();
  tracing = false;
}

// Forgets what was traced; the buffers that count as global memory are added next, aligned to 32 bytes.
__attribute__((visibility("default"))) void trace_clear() {
  buffers.clear();
  launches.clear();
}

__attribute__((visibility("default"))) void trace_buffer(const void* begin, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const size_t sectors = (bytes + kSector - 1) / kSector;
  buffers.push_back({address, address + bytes, std::vector<bool>(sectors), std::vector<bool>(sectors)});
}

__attribute__((visibility("default"))) const char* trace_json() {
  static std::string text;
  text = "[";
  for (const Launch& launch : launches) {
    if (text.size() > 1) text += ", ";
    text += "{\"kernel\": \"" + launch.kernel + "\", \"blocks\": " + std::to_string(launch.blocks) +
            ", \"threads\": " + std::to_string(launch.threads) + ", \"shared\": " + std::to_string(launch.shared) +
            ", \"loads\": " + json(launch.loads) + ", \"stores\": " + json(launch.stores) + "}";
  }
  return (text += "]").c_str();
}

#define TRACED(bytes)                                                                                    \
  void __tsan_read##bytes(void* at) { record(at, bytes, false, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* at) { record(at, bytes, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##bytes(void* at) { record(at, bytes, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* at) { record(at, bytes, true, __builtin_return_address(0)); }
TRACED(1)
TRACED(2)
TRACED(4)
TRACED(8)
TRACED(16)
void __tsan_read_range(void* at, size_t bytes) {
  record(at, static_cast<unsigned>(bytes), false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  record(at, static_cast<unsigned>(bytes), true, __builtin_return_address(0));
}

// Atomics: one access each, counted with the stores. A compare and exchange that fails is another one.
#define TRACED_ATOMICS(bits, Word)                                                                      \
  Word __tsan_atomic##bits##_load(const Word* at, int order) { return __atomic_load_n(at, order); }     \
  void __tsan_atomic##bits##_store(Word* at, Word value, int order) {                                   \
    record(at, sizeof(Word), true, __builtin_return_address(0));                                        \
    __atomic_store_n(at, value, order);                                                                 \
  }                                                                                                     \
  Word __tsan_atomic##bits##_exchange(Word* at, Word value, int order) {                                \
    record(at, sizeof(Word), true, __builtin_return_address(0));                                        \
    return __atomic_exchange_n(at, value, order);                                                       \
  }                                                                                                     \
  Word __tsan_atomic##bits##_fetch_add(Word* at, Word value, int order) {                               \
    record(at, sizeof(Word), true, __builtin_return_address(0));                                        \
    return __atomic_fetch_add(at, value, order);                                                        \
  }                                                                                                     \
  Word __tsan_atomic##bits##_fetch_sub(Word* at, Word value, int order) {                               \
    record(at, sizeof(Word), true, __builtin_return_address(0));                                        \
    return __atomic_fetch_sub(at, value, order);                                                        \
  }                                                                                                     \
  Word __tsan_atomic##bits##_fetch_or(Word* at, Word value, int order) {                                \
    record(at, sizeof(Word), true, __builtin_return_address(0));                                        \
    return __atomic_fetch_or(at, value, order);                                                         \
  }                                                                                                     \
  Word __tsan_atomic##bits##_fetch_and(Word* at, Word value, int order) {                               \
    record(at, sizeof(Word), true, __builtin_return_address(0));                                        \
    return __atomic_fetch_and(at, value, order);                                                        \
  }                                                                                                     \
  int __tsan_atomic##bits##_compare_exchange_strong(Word* at, Word* expected, Word value, int, int) {   \
    record(at, sizeof(Word), true, __builtin_return_address(0));                                        \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                                     \
  int __tsan_atomic##bits##_compare_exchange_weak(Word* at, Word* expected, Word value, int, int) {     \
    record(at, sizeof(Word), true, __builtin_return_address(0));                                        \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                                     \
  Word __tsan_atomic##bits##_compare_exchange_val(Word* at, Word expected, Word value, int, int) {      \
    record(at, sizeof(Word), true, __builtin_return_address(0));                                        \
    __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);       \
    return expected;                                                                                    \
  }
TRACED_ATOMICS(8, uint8_t)
TRACED_ATOMICS(32, uint32_t)
TRACED_ATOMICS(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

}  // extern "C"

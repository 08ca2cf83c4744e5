#include "shared_memory.h"

#include <algorithm>
#include <cstring>

#include "block.h"

namespace simt {
namespace {

constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type
constexpr unsigned char kGuard = 0xA5;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuardBytes = 0;  // AddressSanitizer has its own, and says who went there
#else
constexpr size_t kGuardBytes = 64;
#endif

}  // namespace

void* shared_array(const void* key, const char* name, size_t bytes, const Site& site) {
  const Unwatched unwatched;
  size_t all = bytes;
  for (const SharedArray& array : block->shared) {
    if (array.key == key) return array.memory.get();
    all += array.bytes;
  }
  if (all > block->shared_limit) {
    fail("with " + std::string(name) + " the block has " + std::to_string(all) + " bytes of shared memory, more than " +
             std::to_string(block->shared_limit),
         site);
  }
  char* memory = static_cast<char*>(std::malloc(bytes + kGuardBytes));
  std::memset(memory, kPoison, bytes);
  std::memset(memory + bytes, kGuard, kGuardBytes);
  block->shared.push_back({key, name, bytes, {memory, std::free}});
  return memory;
}

void* dynamic_shared(const char* name, const Site& site) {
  static const char key = 0;
  return shared_array(&key, name, block->dynamic_bytes, site);
}

const char* overrun() {
  for (const SharedArray& array : block->shared) {
    const char* const end = array.memory.get() + array.bytes;
    if (std::any_of(end, end + kGuardBytes, [](char byte) { return static_cast<unsigned char>(byte) != kGuard; })) {
      return array.name;
    }
  }
  return nullptr;
}

}  // namespace simt

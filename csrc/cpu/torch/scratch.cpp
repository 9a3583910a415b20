#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace macaron_ops {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKept = size_t(64) << 20;  // bytes that wait for the next call at most

struct alignas(kAlignment) Header {  // in front of each block
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Header*> waiting;
  size_t kept = 0, used = 0, peak = 0;

  void use(size_t bytes) {
    used += bytes;
    peak = std::max(peak, used);
  }
};

Pool& pool() {
  static Pool* const pool = new Pool;  // never destroyed: threads may still release while the process ends
  return *pool;
}

}  // namespace

void* allocate_scratch(size_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    auto best = p.waiting.end();
    for (auto it = p.waiting.begin(); it != p.waiting.end(); ++it)
      if ((*it)->bytes >= bytes && (*it)->bytes - bytes <= bytes / 8 &&
          (best == p.waiting.end() || (*it)->bytes < (*best)->bytes))
        best = it;
    Header* found = nullptr;
    if (best != p.waiting.end()) {
      found = *best;
      p.waiting.erase(best);
      p.kept -= found->bytes;
    }
    if (found != nullptr) {
      p.use(found->bytes);
      return found + 1;
    }
  }
  auto* block = static_cast<Header*>(std::aligned_alloc(kAlignment, sizeof(Header) + bytes));
  if (block == nullptr) throw std::bad_alloc();
  block->bytes = bytes;
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.use(bytes);
  return block + 1;
}

void release_scratch(void* memory) {
  Header* block = static_cast<Header*>(memory) - 1;
  Pool& p = pool();
  std::vector<Header*> dropped;
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.used -= block->bytes;
    p.waiting.push_back(block);
    p.kept += block->bytes;
    while (p.kept > kKept) {  // the oldest go first
      dropped.push_back(p.waiting.front());
      p.kept -= p.waiting.front()->bytes;
      p.waiting.erase(p.waiting.begin());
    }
  }
  for (Header* old : dropped) std::free(old);
}

int64_t scratch_peak() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  const size_t peak = p.peak;
  p.peak = p.used;
  return int64_t(peak);
}

}  // namespace macaron_ops

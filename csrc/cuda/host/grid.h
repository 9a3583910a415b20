// A kernel's grid on one thread of the CPU, for tests of its numbers and of its barriers.
//
// The threads of a block are fibers (ucontext starts one, setjmp and longjmp switch: no system call). A fiber runs until
// it has to wait for others, at a barrier or a warp's exchange; which one runs then is the order's choice, and an order
// is chosen to be unkind. MACARON_OPS_THREAD_ORDER, read at each launch:
//
//   in-turn            each thread from one wait to the next
//   forward, backward  a warp goes on as far as it can before another may; the first or the last warp and thread first:
//                      who reads what another thread writes, without a barrier between, reads too early
//   a number           the same in an order that this seed shuffles again and again
//
// "backward" and numbers also start the blocks in another order. An asynchronous copy arrives when its thread waits for
// it, with "backward" at once, with a number at one of both times: before it is awaited it may have arrived, or not.
// Shared memory is filled with NaN before each block.
// What ends a launch with std::runtime_error: threads that wait where no one will come, threads of a block at different
// barriers, a barrier that some threads have left the kernel without, lanes of one warp in different exchanges.
//
// Not seen: races of global memory between blocks, and what a cache or a weaker memory model would do.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  uint64_t count() const { return uint64_t(x) * y * z; }
};

namespace cuda_on_host {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = size_t(64) << 10, kMostShared = size_t(227) << 10;

// Where in the source threads wait: the same place for all of them.
struct Site {
  const char* file = nullptr;
  int line = 0;
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string text() const { return std::string(file).substr(std::string(file).rfind('/') + 1) + ":" + std::to_string(line); }
};

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("CUDA on the host: " + what); }

struct Block;

// 16 bytes on their way to shared memory; zeros where there is no `from`.
struct Copy {
  void* to;
  const void* from;
  int group;

  void arrive() const {
    if (from != nullptr) std::memcpy(to, from, 16);
    else std::memset(to, 0, 16);
  }
};

struct Fiber {
  Block* block;
  int index;  // in the block
  bool started, done;
  std::vector<Copy> copies;
  int groups = 0;
  jmp_buf at;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

// The lanes of a warp hand each other a few bytes. Two rounds are kept: who is late still reads the one before.
struct Warp {
  uint64_t round = 0;
  uint32_t arrived = 0, mask = 0;
  Site site;
  alignas(16) unsigned char slots[2][kWarp][64];
};

struct Block {
  dim3 grid, dim, index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  std::function<bool()> copy_is_early;
  const std::function<void()>* kernel = nullptr;
  int live = 0, waiting = 0;  // threads that have not ended; of them, at the barrier
  uint64_t barrier = 0, progress = 0;
  Site site;  // of the barrier
  jmp_buf scheduler;
  std::exception_ptr error;
};

inline Fiber*& current() {
  static Fiber* fiber = nullptr;
  return fiber;
}
inline Block& block() { return *current()->block; }

// -- waiting ---------------------------------------------------------------------------------------------------------

inline void yield() {
  Fiber* me = current();
  if (_setjmp(me->at) == 0) _longjmp(me->block->scheduler, 1);
}

inline void wait_for_block(Site site) {
  Block& b = block();
  ++b.progress;
  if (b.live < int(b.fibers.size())) fail("a barrier at " + site.text() + " after threads of its block have ended");
  if (b.waiting == 0) b.site = site;
  if (!(b.site == site)) fail("threads of one block at different barriers: " + b.site.text() + ", " + site.text());
  if (++b.waiting == b.live) {
    b.waiting = 0;
    ++b.barrier;
    return;
  }
  for (const uint64_t mine = b.barrier; b.barrier == mine;) yield();
}

// What each lane of `mask` brought: [lane][byte]. Valid until the next exchange but one.
inline unsigned char (*exchange(uint32_t mask, const void* bytes, size_t count, Site site))[64] {
  Fiber* me = current();
  Warp& w = me->block->warps[size_t(me->index / kWarp)];
  const int lane = me->index % kWarp;
  ++me->block->progress;
  if ((mask >> lane & 1) == 0) fail("lane " + std::to_string(lane) + " is not in its own mask at " + site.text());
  if (w.arrived == 0) {
    w.site = site;
    w.mask = mask;
  }
  if (!(w.site == site) || w.mask != mask)
    fail("lanes of one warp in different exchanges: " + w.site.text() + ", " + site.text());
  unsigned char(*slots)[64] = w.slots[w.round & 1];
  std::memcpy(slots[lane], bytes, count);
  w.arrived |= 1u << lane;
  if (w.arrived == mask) {
    w.arrived = 0;
    ++w.round;
  } else {
    for (const uint64_t mine = w.round; w.round == mine;) yield();
  }
  return slots;
}

// -- running ---------------------------------------------------------------------------------------------------------

inline void enter() {
  Block& b = block();
  try {
    (*b.kernel)();
    if (b.waiting > 0) fail("a thread ended while others wait at the barrier " + b.site.text());
  } catch (...) {
    if (!b.error) b.error = std::current_exception();
  }
  current()->done = true;
  --b.live;
  ++b.progress;
  _longjmp(b.scheduler, 1);
}

inline void resume(Fiber& f) {
  Block& b = *f.block;
  if (f.done || b.error) return;
  current() = &f;
  if (_setjmp(b.scheduler) != 0) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, enter, 0);
  setcontext(&f.context);
}

class Order {
 public:
  Order() {
    const char* asked = std::getenv("MACARON_OPS_THREAD_ORDER");
    const std::string name = asked == nullptr ? "forward" : asked;
    backward_ = name == "backward";
    in_turn_ = name == "in-turn";
    shuffled_ = !name.empty() && name.find_first_not_of("0123456789") == std::string::npos;
    if (shuffled_) random_.seed(unsigned(std::stoul(name)));
    else if (!backward_ && !in_turn_ && name != "forward")
      fail("MACARON_OPS_THREAD_ORDER=" + name + ": expected in-turn, forward, backward or a number");
  }
  bool in_turn() const { return in_turn_; }
  bool copy_is_early() { return shuffled_ ? random_() % 2 == 0 : backward_; }
  std::vector<uint64_t> of(uint64_t count) {
    std::vector<uint64_t> order(count);
    for (uint64_t i = 0; i < count; ++i) order[i] = backward_ ? count - 1 - i : i;
    if (shuffled_) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

 private:
  bool backward_, in_turn_, shuffled_;
  std::mt19937 random_;
};

inline void run_block(Block& b, Order& order) {
  b.live = int(b.fibers.size());
  b.waiting = 0;
  for (Warp& w : b.warps) w.arrived = 0;
  for (Fiber& f : b.fibers) {
    f.started = f.done = false;
    f.copies.clear();
  }
  while (b.live > 0) {
    const uint64_t before = b.progress;
    for (const uint64_t w : order.of(b.warps.size())) {
      const size_t first = w * kWarp, count = std::min<size_t>(kWarp, b.fibers.size() - first);
      uint64_t at;
      do {
        at = b.progress;
        for (const uint64_t lane : order.of(count)) resume(b.fibers[first + lane]);
      } while (!order.in_turn() && b.progress != at && !b.error);
    }
    if (b.error) std::rethrow_exception(b.error);
    if (b.live > 0 && b.progress == before) fail("a deadlock: threads wait for others that will not come");
  }
}

inline void run_grid(dim3 grid, dim3 dim, size_t shared, const std::function<void()>& kernel) {
  const size_t threads = dim.count();
  if (threads == 0 || threads > kMostThreads || shared > kMostShared || grid.count() == 0 || grid.y > 65535 || grid.z > 65535)
    fail("a launch that no GPU accepts");
  Order order;
  std::vector<unsigned char> bytes(shared + 128);
  Block b;
  b.grid = grid;
  b.dim = dim;
  b.kernel = &kernel;
  b.copy_is_early = [&order] { return order.copy_is_early(); };
  b.warps.resize((threads + kWarp - 1) / kWarp);
  b.fibers.resize(threads);
  b.shared = bytes.data() + (128 - uintptr_t(bytes.data()) % 128) % 128;
  for (size_t i = 0; i < threads; ++i) {
    b.fibers[i].block = &b;
    b.fibers[i].index = int(i);
    b.fibers[i].stack.reset(new char[kStack]);
  }
  for (const uint64_t i : order.of(grid.count())) {
    b.index = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
    std::memset(b.shared, 0xff, shared);  // NaN, in every floating type
    run_block(b, order);
  }
}

}  // namespace cuda_on_host

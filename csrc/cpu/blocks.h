// How the tokens of a call are divided among threads.
#pragma once

#include "product.h"
#include "host.h"

namespace macaron_ops::MACARON_OPS_ISA {

// Panels for which a weight is read once: more of them leave the L2 cache.
constexpr int64_t kBlockPanels = kLargeL2 ? 8 : 2;

// Many tokens: each thread takes blocks of panels and does everything for them, so that activations stay in its cache.
// Few tokens: one block at a time, whose rows of weights the threads divide.
template <class WordT>
struct Division {
  int64_t panels, block;
  bool by_features;

  Division(const Host& host, int64_t rows) : panels(ceil_div(rows, kPanel)) {
    by_features = host.threads > 1 && panels < 2 * host.threads;
    block = by_features ? smaller<int64_t>(panels, 2 * kBlockPanels)
                        : smaller(kBlockPanels, larger<int64_t>(panels / host.threads, 1));
  }

  // work(host, first panel, panels): the host has one thread where threads take blocks of their own.
  template <class Work>
  void run(const Host& host, int64_t first, int64_t last, const Work& work) const {
    const int64_t blocks = ceil_div(last - first, block);
    auto run_blocks = [&](const Host& inner, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t panel = first + b * block;
        work(inner, panel, smaller(block, last - panel));
      }
    };
    if (by_features) return run_blocks(host, 0, blocks);
    Host alone = host;
    alone.threads = 1;
    parallel(host, blocks, [&](int64_t begin, int64_t end) { run_blocks(alone, begin, end); });
  }
};

// Tokens of panel `p` of a tensor with `rows` rows.
MACARON_INLINE int64_t tokens_of(int64_t p, int64_t rows) { return smaller<int64_t>(kPanel, rows - p * kPanel); }

}  // namespace macaron_ops::MACARON_OPS_ISA

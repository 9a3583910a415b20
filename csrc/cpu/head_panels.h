// How the tokens of a head are laid out in panels: known to the kernels (heads.h) and to whoever allocates for them.
#pragma once

#include <cstdint>

namespace macaron_ops {

struct HeadPanels {
  static constexpr int64_t kLanes = 32;      // tokens of a panel, of a longer sequence
  static constexpr int64_t kWidest = 64;     // a sequence of so many is one panel
  static constexpr int64_t kSlack = kWidest; // words after the last panel of a buffer

  int64_t tokens, head_dim;
  int64_t width;   // lanes of a panel
  int64_t panels;  // of a sequence
  int64_t size;    // words of a panel

  HeadPanels() : HeadPanels(0, 0, 1) {}
  // `elements`: of a word.
  HeadPanels(int64_t tokens, int64_t head_dim, int64_t elements)
      : tokens(tokens),
        head_dim(head_dim),
        // Even, because a pair along tokens must not reach into the next channel.
        width(tokens > kWidest ? kLanes : tokens < 2 ? 2 : (tokens + 1) / 2 * 2),
        panels((tokens + width - 1) / width),
        size((head_dim + elements - 1) / elements * width) {}

  int64_t words() const { return panels * size; }                                     // of a sequence
  int64_t word(int64_t token) const { return token / width * size + token % width; }  // of its first channel
  int64_t blocks() const { return (tokens + kLanes - 1) / kLanes; }                   // never in two panels
};

}  // namespace macaron_ops

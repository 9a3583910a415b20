// The loops of sphere_attend_step for P <= 8 channels: everything that belongs to one vector of owners stays in
// registers, the others are broadcast from where they lie. The limit is the multiply-add unit: for P = 3 forward has
// 11 multiply-adds per pair of particles (5 of them the polynomial of 2^t), mutual 21.
#pragma once

#include "sphere.h"

namespace macaron_ops::MACARON_OPS_ISA {

template <int P>
struct Small {
  // Others whose terms are added before they are added to the total, see blocks.
  static constexpr int64_t kShortest = 64, kLongest = 512;

  struct Channels {
    Vec at[P];
  };

  MACARON_INLINE Channels zeros() { return {}; }
  MACARON_INLINE Channels lanes(const float* panel) {
    Channels c;
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) c.at[i] = load(panel + i * kPanel);
    return c;
  }
  MACARON_INLINE void keep(float* panel, const Channels& c) {
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) store(panel + i * kPanel, c.at[i]);
  }
  MACARON_INLINE Vec dot(const Channels& c, const float* row) {
    Vec sum = c.at[0] * row[0];
#pragma GCC unroll 8
    for (int i = 1; i < P; ++i) sum = c.at[i] * row[i] + sum;
    return sum;
  }
  MACARON_INLINE Vec dot(const Channels& c, const float* row, Vec start) {
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) start = c.at[i] * row[i] + start;
    return start;
  }
  MACARON_INLINE void add(Channels& sum, Vec factor, const float* row) {
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) sum.at[i] = factor * row[i] + sum.at[i];
  }
  MACARON_INLINE void add(Channels& sum, const Channels& term) {
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) sum.at[i] += term.at[i];
  }

  // block(begin, end) on the others that any lane sees. Of n terms of either sign in blocks of b, the variance of the
  // error grows with n b (inside blocks) and n^2 / b (from block to block): it is least where b is the root of n. Where
  // weights may span more than float32's range, few others decide the sums; the first sums of a block are often
  // denormal there, which is slow, so that blocks are few.
  template <class Block>
  MACARON_INLINE void blocks(const Particles<float>& p, const Visible& visible, const Block& block) {
    const bool narrow = p.bounded && p.shift == 0.f;
    const int64_t root = int64_t(__builtin_sqrtf(float(visible.end - visible.begin)));
    const int64_t others = narrow ? larger(kShortest, root) : kLongest;
    for (int64_t begin = visible.begin; begin < visible.end; begin += others)
      block(begin, smaller(visible.end, begin + others));
  }
  // run(begin, end, masked) on the parts of begin ... end before, inside and after what all lanes see.
  template <class Run>
  MACARON_INLINE void runs(const Visible& visible, int64_t begin, int64_t end, const Run& run) {
    const int64_t first = smaller(end, larger(begin, visible.all_begin));
    const int64_t last = larger(first, smaller(end, visible.all_end));
    if (begin < first) run(begin, first, True{});
    run(first, last, False{});
    if (last < end) run(last, end, True{});
  }

  template <bool bounded>
  static void forward(const Particles<float>& p, const Owners<float>& own, const Sums& sums, float*) {
    for (int64_t lane = 0; lane < own.count; lane += kLanes) {
      const int64_t query = own.begin + lane;
      const Channels q = lanes(own.own + lane);
      const Visible visible = visible_keys(p, query, kLanes);
      const bool running = p.softmax && !bounded;  // the largest score so far
      Vec shift = broadcast(running ? -__builtin_inff() : p.shift), total = {};
      Channels u = zeros();
      blocks(p, visible, [&](int64_t begin, int64_t end) {
        if (running) {
          Vec most = shift;
          runs(visible, begin, end, [&](int64_t from, int64_t to, auto masked) {
            for (int64_t j = from; j < to; ++j) {
              const Vec t = dot(q, p.key.row(j)) * p.scale;
              const Vec seen = masked ? choose(queries_seeing(query, j), t, broadcast(-__builtin_inff())) : t;
              most = at_least(seen, most);
            }
          });
          const Vec rescale = choose(most == shift, broadcast(1.f), exp2(shift - most));
          total *= rescale;
#pragma GCC unroll 8
          for (int i = 0; i < P; ++i) u.at[i] *= rescale;
          shift = most;
        }
        Vec block_total = {};
        Channels block_u = zeros();
        runs(visible, begin, end, [&](int64_t from, int64_t to, auto masked) {
          const auto other = [&](int64_t j, Vec& sum) {
            const Vec e = weight<bounded, masked.value>(dot(q, p.key.row(j)), p.scale, shift, p.fraction,
                                                        queries_seeing(query, j));
            sum += e;
            add(block_u, e, p.value.row(j));
          };
          int64_t j = from;
          for (; j + kFew <= to; j += kFew) {
            Vec few = {};
#pragma GCC unroll 8
            for (int64_t i = 0; i < kFew; ++i) other(j + i, few);
            block_total += few;
          }
          for (; j < to; ++j) other(j, block_total);
        });
        total += block_total;
        add(u, block_u);
      });
      keep(sums.first + lane, u);
      store(sums.shift + lane, shift);
      store(sums.total + lane, total);
    }
  }

  // first: sum_j a_ij k_j; slope. To settle d_i, second: sum_j e_ij k_j; excess, mean.
  template <bool bounded, bool settle>
  static void queries_of(const Particles<float>& p, const Owners<float>& own, const Sums& sums, float*) {
    for (int64_t lane = 0; lane < own.count; lane += kLanes) {
      const int64_t query = own.begin + lane;
      const Channels q = lanes(own.own + lane), g = lanes(own.grad_u + lane);
      const Vec shift = load(own.shift + lane), offset = load(own.offset + lane);
      const Visible visible = visible_keys(p, query, kLanes);
      Channels along_k = zeros(), weighted_k = zeros();
      Vec excess = {}, slope = {}, mean = {};
      blocks(p, visible, [&](int64_t begin, int64_t end) {
        Channels block = zeros(), block_k = zeros();
        Vec block_excess = {}, block_slope = {}, block_mean = {};
        runs(visible, begin, end, [&](int64_t from, int64_t to, auto masked) {
          for (int64_t j = from; j < to; ++j) {
            const float* k = p.key.row(j);
            const Vec score = dot(q, k);
            const Vec e = weight<bounded, masked.value>(score, p.scale, shift, 1.f, queries_seeing(query, j));
            const Vec a = e * (dot(g, p.value.row(j)) - offset);
            add(block, a, k);
            block_slope += a * score;
            if constexpr (settle) {
              add(block_k, e, k);
              block_excess += a;
              block_mean += e * score;
            }
          }
        });
        add(along_k, block);
        slope += block_slope;
        if constexpr (settle) {
          add(weighted_k, block_k);
          excess += block_excess;
          mean += block_mean;
        }
      });
      keep(sums.first + lane, along_k);
      store(sums.slope + lane, slope);
      if constexpr (settle) {
        keep(sums.second + lane, weighted_k);
        store(sums.excess + lane, excess);
        store(sums.mean + lane, mean);
      }
    }
  }
  template <bool bounded>
  static void queries(const Particles<float>& p, const Owners<float>& own, const Sums& sums, float* scratch) {
    if (sums.settle) queries_of<bounded, true>(p, own, sums, scratch);
    else queries_of<bounded, false>(p, own, sums, scratch);
  }

  static void along(const Particles<float>& p, const Owners<float>& own, float* along) {
    for (int64_t lane = 0; lane < own.count; lane += kLanes)
      store(along + lane, dot(lanes(own.grad_u + lane), p.value.row(0)));
  }

  // first: sum_i a_ij q_i; second: sum_i e_ij g_i.
  template <bool bounded>
  static void keys(const Particles<float>& p, const Owners<float>& own, const Sums& sums, float*) {
    for (int64_t lane = 0; lane < own.count; lane += kLanes) {
      const int64_t key = own.begin + lane;
      const Channels k = lanes(own.own + lane), v = lanes(own.value + lane);
      const Visible visible = visible_queries(p, key, kLanes);
      Channels along_q = zeros(), along_g = zeros();
      blocks(p, visible, [&](int64_t begin, int64_t end) {
        Channels block_q = zeros(), block_g = zeros();
        runs(visible, begin, end, [&](int64_t from, int64_t to, auto masked) {
          for (int64_t i = from; i < to; ++i) {
            const float *q = p.query.row(i), *g = p.grad_u.row(i);
            const Vec shift = broadcast(p.shifts[i]);
            const Vec e = weight<bounded, masked.value>(dot(k, q), p.scale, shift, 1.f, keys_seen(key, i));
            add(block_q, e * (dot(v, g) - p.offset[i]), q);
            add(block_g, e, g);
          }
        });
        add(along_q, block_q);
        add(along_g, block_g);
      });
      keep(sums.first + lane, along_q);
      keep(sums.second + lane, along_g);
    }
  }

  // first: sum_j b_ij x_j; second: sum_j e_ij g_j; slope. Nothing is masked.
  static void mutual(const Particles<float>& p, const Owners<float>& own, const Sums& sums, float*) {
    for (int64_t lane = 0; lane < own.count; lane += kLanes) {
      const Channels x = lanes(own.own + lane), g = lanes(own.grad_u + lane);
      const Vec offset = load(own.offset + lane), shift = broadcast(p.shift);
      Channels along_x = zeros(), along_g = zeros();
      Vec slope = {};
      blocks(p, visible_keys(p, 0, kLanes), [&](int64_t begin, int64_t end) {
        Channels block_x = zeros(), block_g = zeros();
        Vec block_slope = {};
        for (int64_t j = begin; j < end; ++j) {
          const float *x_j = p.key.row(j), *g_j = p.grad_u.row(j);
          const Vec score = dot(x, x_j);
          const Vec e = weight<true, false>(score, p.scale, shift, 1.f, VecI{});
          const Vec b = e * dot(x, g_j, dot(g, x_j, -offset - p.offset[j]));
          add(block_x, b, x_j);
          add(block_g, e, g_j);
          block_slope += b * score;
        }
        add(along_x, block_x);
        add(along_g, block_g);
        slope += block_slope;
      });
      store(sums.slope + lane, slope);
      keep(sums.first + lane, along_x);
      keep(sums.second + lane, along_g);
    }
  }

  MACARON_INLINE Loops<float> loops(bool bounded) {
    if (bounded) return {forward<true>, queries<true>, keys<true>, mutual, along};
    return {forward<false>, queries<false>, keys<false>, nullptr, along};
  }
};

// The loops for as many channels as the wider of query and value has: the other one gets channels of zeros.
struct SmallLoops {
  using WordT = float;
  static constexpr int64_t kChannels = 8;
  static constexpr int64_t kScratch = 0;

  MACARON_INLINE int64_t padded(int64_t channels, int64_t others) { return larger(channels, others); }

  template <int P = 1>
  static Loops<float> loops(int64_t channels, bool bounded) {
    if (channels == P) return Small<P>::loops(bounded);
    if constexpr (P < kChannels) return loops<P + 1>(channels, bounded);
    return {};
  }
};

}  // namespace macaron_ops::MACARON_OPS_ISA

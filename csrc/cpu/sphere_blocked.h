// The loops of sphere_attend_step for any number of channels: per panel of owners and block of others two to five matrix
// products on panels (product.h), whose left operands are the particles where they lie, and one pass over the block's
// scores in between. A block of scores and the panels of owners stay in the first caches.
//
// Where words are pairs of bf16, the weights and the gradients of scores are rounded to bf16 on their way into a product,
// as all its operands are; sums and scores are floats.
#pragma once

#include "panel.h"
#include "sphere.h"

namespace macaron_ops::MACARON_OPS_ISA {

template <class W>
struct BlockedLoops {
  using WordT = W;
  using Element = typename Arithmetic<WordT>::Element;
  static constexpr int kStep = kElements<WordT>;
  static constexpr int64_t kBlock = 96;  // others of a block: whole tiles of product.h
  // Terms of a score that are added one after the other: beta multiplies the error of their sum, which for one chain of
  // 64 is twice that of a library's product. Scores of bf16 are sums of numbers that were rounded to far less.
  static constexpr int64_t kTerms = kStep > 1 ? 64 : 16;
  static constexpr int64_t kScores = kBlock * kPanel;
  static constexpr int64_t kScratch = 2 * kScores;

  MACARON_INLINE int64_t padded(int64_t channels, int64_t) { return round_up(channels, kStep); }

  // c (+)= rows of a times the panel b.
  static void product(int64_t rows, const Left<Element>& a, const WordT* b, int64_t count, float* c, bool accumulate) {
    for (int64_t i = 0; i < rows; i += kVectorRows)
      vector_rows<WordT>(smaller<int64_t>(kVectorRows, rows - i), a.rows_from(i), b, kPanel, count, c + i * kPanel,
                         kPanel, accumulate);
  }
  // scores[j][lane] (+)= <other j, lane>, for the others from `begin` to `end`.
  static void multiply(const Others<WordT>& others, int64_t begin, int64_t end, const WordT* panel, int64_t count,
                       float* scores, bool accumulate = false) {
    const int64_t channels = others.channels;
    for (int64_t c = 0; c < channels; c += kTerms)
      product(end - begin, {others.row(begin) + c, channels, kStep, smaller(kTerms, channels - c) / kStep},
              panel + c / kStep * kPanel, count, scores, accumulate || c > 0);
  }
  // sum[c][lane] += sum_j other_j[c] weights[j][lane]
  static void add(const Others<WordT>& others, int64_t begin, int64_t end, const float* weights, int64_t count,
                  float* sum) {
    const int64_t channels = others.channels;
    product(channels, {others.columns + begin * channels, kStep, kStep * channels, ceil_div(end - begin, kStep)},
            words(weights), count, sum, true);
  }
  MACARON_INLINE void clear(float* panel, int64_t channels) {
    std::memset(panel, 0, size_t(channels * kPanel) * sizeof(float));
  }
  MACARON_INLINE void add_lanes(Vec term, float* sum) { store(sum, load(sum) + term); }
  // Scores that became words, at the front of their buffer.
  MACARON_INLINE const WordT* words(const float* scores) { return reinterpret_cast<const WordT*>(scores); }
  MACARON_INLINE void store_word(float* scores, int64_t word, const Vec* elements) {
    store_words(reinterpret_cast<WordT*>(scores) + word * kPanel, elements[0], elements[kStep - 1]);
  }

  // block(begin, end, masked)
  template <class Block>
  MACARON_INLINE void blocks(const Visible& visible, const Block& block) {
    for (int64_t begin = visible.begin; begin < visible.end; begin += kBlock) {
      const int64_t end = smaller(visible.end, begin + kBlock);
      if (begin < visible.all_begin || end > visible.all_end) block(begin, end, True{});
      else block(begin, end, False{});
    }
  }
  // word(j, elements) for 0 <= j < count: the others of one word, the last of which may be half empty.
  template <class Word>
  MACARON_INLINE void by_words(int64_t count, const Word& word) {
    int64_t j = 0;
    for (; j + kStep <= count; j += kStep) word(j, kStep);
    if (j < count) word(j, 1);
  }
  // Turns a vector of lanes of scores and of the gradients of weights into words of weights and of the gradients of
  // scores, by pair(j, score, grad, e, a).
  template <class Function>
  MACARON_INLINE void differentiate(int64_t count, float* scores, float* grads, const Function& pair) {
    by_words(count, [&](int64_t j, int there) {
      Vec e[kStep] = {}, a[kStep] = {};
#pragma GCC unroll 2
      for (int s = 0; s < there; ++s)
        pair(j + s, load(scores + (j + s) * kPanel), load(grads + (j + s) * kPanel), e[s], a[s]);
      store_word(scores, j / kStep, e);
      store_word(grads, j / kStep, a);
    });
  }

  template <bool bounded>
  static void forward(const Particles<WordT>& p, const Owners<WordT>& own, const Sums& sums, float* scores) {
    const bool running = p.softmax && !bounded;  // the largest score so far
    clear(sums.first, p.value.channels);
    for (int lane = 0; lane < kPanel; ++lane) {
      sums.shift[lane] = running ? -__builtin_inff() : p.shift;
      sums.total[lane] = 0.f;
    }
    blocks(visible_keys(p, own.begin, kPanel), [&](int64_t begin, int64_t end, auto masked) {
      multiply(p.key, begin, end, own.own, own.count, scores);
      for (int64_t lane = 0; lane < own.count; lane += kLanes) {
        const int64_t query = own.begin + lane;
        Vec shift = load(sums.shift + lane);
        if (running) {
          Vec most = shift;
          for (int64_t j = begin; j < end; ++j) {
            const Vec t = load(scores + (j - begin) * kPanel + lane) * p.scale;
            const Vec seen = masked ? choose(queries_seeing(query, j), t, broadcast(-__builtin_inff())) : t;
            most = at_least(seen, most);
          }
          const Vec rescale = choose(most == shift, broadcast(1.f), exp2(shift - most));
          store(sums.total + lane, load(sums.total + lane) * rescale);
          for (int64_t c = 0; c < p.value.channels; ++c) {
            float* sum = sums.first + c * kPanel + lane;
            store(sum, load(sum) * rescale);
          }
          store(sums.shift + lane, shift = most);
        }
        Vec total = {}, few = {};
        by_words(end - begin, [&](int64_t j, int there) {
          Vec e[kStep] = {};
#pragma GCC unroll 2
          for (int s = 0; s < there; ++s) {
            e[s] = weight<bounded, masked.value>(load(scores + (j + s) * kPanel + lane), p.scale, shift, p.fraction,
                                                 queries_seeing(query, begin + j + s));
            few += e[s];
          }
          store_word(scores + lane, j / kStep, e);
          if ((j + kStep) % kFew == 0) total += few, few = Vec{};
        });
        add_lanes(total + few, sums.total + lane);
      }
      add(p.value, begin, end, scores, own.count, sums.first);
    });
  }

  // first: sum_j a_ij k_j; slope. To settle d_i, second: sum_j e_ij k_j; excess, mean.
  template <bool bounded>
  static void queries(const Particles<WordT>& p, const Owners<WordT>& own, const Sums& sums, float* scores) {
    float* grads = scores + kScores;
    clear(sums.first, p.key.channels);
    if (sums.need_second) clear(sums.second, p.key.channels);
    clear(sums.slope, 1);
    clear(sums.excess, 1);
    clear(sums.mean, 1);
    blocks(visible_keys(p, own.begin, kPanel), [&](int64_t begin, int64_t end, auto masked) {
      multiply(p.key, begin, end, own.own, own.count, scores);
      multiply(p.value, begin, end, own.grad_u, own.count, grads);
      for (int64_t lane = 0; lane < own.count; lane += kLanes) {
        const Vec shift = load(own.shift + lane), offset = load(own.offset + lane);
        Vec slope = {}, excess = {}, mean = {};
        differentiate(end - begin, scores + lane, grads + lane, [&](int64_t j, Vec score, Vec grad, Vec& e, Vec& a) {
          e = weight<bounded, masked.value>(score, p.scale, shift, 1.f, queries_seeing(own.begin + lane, begin + j));
          a = e * (grad - offset);
          slope += a * score;
          excess += a;
          mean += e * score;
        });
        add_lanes(slope, sums.slope + lane);
        add_lanes(excess, sums.excess + lane);
        add_lanes(mean, sums.mean + lane);
      }
      add(p.key, begin, end, grads, own.count, sums.first);
      if (sums.need_second) add(p.key, begin, end, scores, own.count, sums.second);
    });
  }

  static void along(const Particles<WordT>& p, const Owners<WordT>& own, float* along) {
    multiply(p.value, 0, 1, own.grad_u, own.count, along);
  }

  // first: sum_i a_ij q_i; second: sum_i e_ij g_i.
  template <bool bounded>
  static void keys(const Particles<WordT>& p, const Owners<WordT>& own, const Sums& sums, float* scores) {
    float* grads = scores + kScores;
    clear(sums.first, p.query.channels);
    clear(sums.second, p.grad_u.channels);
    blocks(visible_queries(p, own.begin, kPanel), [&](int64_t begin, int64_t end, auto masked) {
      multiply(p.query, begin, end, own.own, own.count, scores);
      if (sums.need_first) multiply(p.grad_u, begin, end, own.value, own.count, grads);
      for (int64_t lane = 0; lane < own.count; lane += kLanes)
        differentiate(end - begin, scores + lane, grads + lane, [&](int64_t i, Vec score, Vec grad, Vec& e, Vec& a) {
          const int64_t query = begin + i;
          e = weight<bounded, masked.value>(score, p.scale, broadcast(p.shifts[query]), 1.f,
                                            keys_seen(own.begin + lane, query));
          if (sums.need_first) a = e * (grad - p.offset[query]);
        });
      if (sums.need_first) add(p.query, begin, end, grads, own.count, sums.first);
      if (sums.need_second) add(p.grad_u, begin, end, scores, own.count, sums.second);
    });
  }

  // first: sum_j b_ij x_j; second: sum_j e_ij g_j; slope. Nothing is masked.
  static void mutual(const Particles<WordT>& p, const Owners<WordT>& own, const Sums& sums, float* scores) {
    float* grads = scores + kScores;
    clear(sums.first, p.key.channels);
    clear(sums.second, p.grad_u.channels);
    clear(sums.slope, 1);
    blocks(visible_keys(p, own.begin, kPanel), [&](int64_t begin, int64_t end, auto) {
      multiply(p.key, begin, end, own.own, own.count, scores);
      multiply(p.key, begin, end, own.grad_u, own.count, grads);
      multiply(p.grad_u, begin, end, own.own, own.count, grads, true);
      for (int64_t lane = 0; lane < own.count; lane += kLanes) {
        const Vec offset = load(own.offset + lane), shift = broadcast(p.shift);
        Vec slope = {};
        differentiate(end - begin, scores + lane, grads + lane, [&](int64_t j, Vec score, Vec grad, Vec& e, Vec& b) {
          e = weight<true, false>(score, p.scale, shift, 1.f, VecI{});
          b = e * (grad - offset - p.offset[begin + j]);
          slope += b * score;
        });
        add_lanes(slope, sums.slope + lane);
      }
      add(p.key, begin, end, grads, own.count, sums.first);
      add(p.grad_u, begin, end, scores, own.count, sums.second);
    });
  }

  static Loops<WordT> loops(int64_t, bool bounded) {
    if (bounded) return {forward<true>, queries<true>, keys<true>, mutual, along};
    return {forward<false>, queries<false>, keys<false>, nullptr, along};
  }
};

}  // namespace macaron_ops::MACARON_OPS_ISA

// Attention of one block of queries of one head, in blocks of keys that stay in the L1 cache (Dao 2023,
// arXiv 2307.08691). Lanes are queries, so that maxima and sums are lane by lane:
//
//   S^T[key][query] = sum_c K[key][c] Q^T[c][query]      P^T = e^(S^T - max)      O^T[c][query] = sum_key V^T[c][key] P^T[key][query]
//
// FLOP: 4 head_dim per query and key; the exponential takes about 20 more instructions per vector of them.
#pragma once

#include "dropout.h"
#include "heads.h"
#include "masks.h"
#include "math.h"

namespace macaron_ops::MACARON_OPS_ISA {

constexpr int64_t kKeyBlock = 4 * kPanel;  // scores of a block: 16 KiB
// Of the sum over keys, or over queries, of values of `head_dim` channels. Of few the chains are short, as in chain_for:
// values that are all one number, too, have rounding errors of one sign.
MACARON_INLINE int64_t chain_over(int64_t tokens, int64_t head_dim) {
  const int64_t chain = chain_for(tokens, head_dim);
  return tokens <= kKeyBlock ? smaller<int64_t>(chain, kPanel / 2) : chain;
}
constexpr float kLog2E = 1.44269504f;  // e^x = 2^(x log2(e))

// What the heads of a call have in common.
template <class X>
struct Attention {
  Visibility<X> see;
  Drop drop;
  float scale;

  // Of an attention weight in the contiguous (B, H, T, S).
  int64_t position(int64_t batch, int64_t head, int64_t query, int64_t key) const {
    return ((batch * see.heads + head) * see.queries + query) * see.keys + key;
  }
};

struct BlockScratch {
  alignas(64) float scores[kKeyBlock * kPanel];
  alignas(64) float masks[kKeyBlock * kPanel];
  alignas(64) Pair pairs[kKeyBlock / 2 * kPanel];
};

// Scales the scores of one vector of queries, masks them, and returns the maximum with what it was.
template <bool given, bool border>
static Vec mask_scores(float* scores, const float* masks, int64_t keys, float scale, VecI lower, VecI upper, int64_t key,
                       Vec maximum) {
  for (int64_t j = 0; j < keys; ++j) {
    Vec s = rounded(load(scores + j * kPanel) * scale);  // as the backward pass will find it
    if constexpr (given) s = masked(s, load(masks + j * kPanel));
    if constexpr (border) {
      const VecI at = VecI{} + int32_t(key + j);
      s = choose((at >= lower) & (at < upper), s, broadcast(kNever));
    }
    maximum = choose(s > maximum, s, maximum);  // NaN is left to the sum
    store(scores + j * kPanel, s);
  }
  return maximum;
}

// e^(score - shift) for what is not positive. The difference comes first: it is small where the weight is large, and so
// is the error that the factor adds. 2^x within an ulp, closer than exp2.h: this error is most of a weight's.
MACARON_INLINE Vec weight_of(Vec score, Vec shift) {
  const Vec x = (score - shift) * kLog2E;
  // Minimax fit of 2^r for |r| <= 1/2, relative error 2e-9, exact at 0.
  const float c[] = {1.f, 0.69314718f, 0.24022648f, 0.055503324f, 0.0096184369f, 0.0013398875f, 1.5353362e-4f};
#if defined(__AVX512F__)
  const Vec r = (Vec)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 0);  // x - round(x); 0 where x is infinite
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)polynomial(r, c), (__m512)(x - r));
#else
  const Vec t = at_least(x, broadcast(-150.f));
  const Vec shifter = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest whole number
  const Vec n = (t + shifter) - shifter, p = polynomial(t - n, c);
  // In two steps, because 2^n alone leaves the exponent's range before the result does.
  const Vec sane = choose(n == n, n, Vec{});  // the conversion of NaN to int is not defined
  const Vec half = __builtin_convertvector(__builtin_convertvector(sane * 0.5f, VecI), Vec);
  return p * power_of_two(half) * power_of_two(sane - half);
#endif
}

// Scores to weights e^(s - shift), and their sum, eight at a time: the rounding errors of weights that are all one number
// have one sign, and grow with the length of the chain.
static inline Vec exponentials(float* scores, int64_t keys, Vec shift) {
  auto next = [&](int64_t j) {
    const Vec p = weight_of(load(scores + j * kPanel), shift);
    store(scores + j * kPanel, p);
    return p;
  };
  Vec total = {}, part[8];
  int64_t j = 0;
  for (; j + 8 <= keys; j += 8) {
    for (int i = 0; i < 8; ++i) part[i] = next(j + i);
    total += sum_of<8>(part);
  }
  Vec rest = {};
  for (; j < keys; ++j) rest += next(j);
  return total + rest;
}

// Rows as words along the rows; for float they are that already.
static inline const float* as_words(const float* rows, int64_t, int64_t, float*) { return rows; }
static inline const Pair* as_words(const float* rows, int64_t count, int64_t lanes, Pair* words) {
  for (int64_t j = 0; j < count; j += 2)
    for (int64_t l = 0; l < lanes; l += kLanes) {
      const float* at = rows + j * kPanel + l;
      store_words(words + j / 2 * kPanel + l, load(at), j + 1 < count ? load(at + kPanel) : Vec{});
    }
  return words;
}
MACARON_INLINE float* word_buffer(float*, float* floats) { return floats; }

// out [head_dim][kPanel] and where it is not null statistics [2][queries], for the queries q.begin ... q.end of a block.
template <class WordT, class X>
static void attend_block(const Attention<X>& a, int64_t batch, int64_t head, Range q, const Head<WordT>& queries,
                         const Head<WordT>& keys, const Head<WordT>& values, BlockScratch& scratch, float* out,
                         float* statistics) {
  constexpr int kVectors = kPanel / kLanes;
  const int64_t lanes = q.end - q.begin, head_dim = queries.at.head_dim, width = keys.at.width;
  const int vectors = int(ceil_div(lanes, kLanes));
  const Range seen = a.see.keys_of(q.begin, q.end), k{seen.begin / width * width, seen.end};  // from a whole panel on
  const bool bounded = !a.see.whole(q, k), given = a.see.has_given();
  Vec maximum[kVectors], total[kVectors];
  VecI lower[kVectors] = {}, upper[kVectors] = {};
  for (int v = 0; v < vectors; ++v) {
    maximum[v] = broadcast(kNever);
    total[v] = Vec{};
    for (int i = 0; i < kLanes && bounded; ++i) {
      const int64_t query = smaller(q.begin + v * kLanes + i, q.end - 1);
      lower[v][i] = int32_t(a.see.lower(query));
      upper[v][i] = int32_t(a.see.upper(query));
    }
  }
  const int64_t chain = chain_over(a.see.keys, head_dim);
  bool first = true;
  for (int64_t k0 = k.begin; k0 < k.end; k0 += kKeyBlock, first = false) {
    const Range block{k0, smaller(k0 + kKeyBlock, k.end)};
    const int64_t count = block.end - block.begin, whole = count / width;
    for (int64_t key = block.begin; key < block.end; key += width)
      for (int64_t r = 0; r < smaller(width, block.end - key); r += kRows<WordT>)
        tile_rows(smaller<int64_t>(kRows<WordT>, smaller(width, block.end - key) - r), keys.rows(key + r), queries.lanes(q.begin),
                  queries.at.width, lanes, scratch.scores + (key - k0 + r) * kPanel, kPanel, false, chain_for(a.see.queries, a.see.keys));
    const bool border = bounded && !a.see.whole(q, block);
    if (given) a.see.fill(batch, head, q, block, true, scratch.masks);
    for (int v = 0; v < vectors; ++v) {
      float* scores = scratch.scores + v * kLanes;
      const float* masks = scratch.masks + v * kLanes;
      const auto mask = given ? (border ? mask_scores<true, true> : mask_scores<true, false>)
                              : (border ? mask_scores<false, true> : mask_scores<false, false>);
      const Vec before = maximum[v];
      maximum[v] = mask(scores, masks, count, a.scale, lower[v], upper[v], k0, before);
      // Where every key is blocked so far the maximum is -inf, and e^(-inf - 0) is the 0 that is wanted.
      const Vec shift = choose(maximum[v] == kNever, Vec{}, maximum[v]);
      const Vec sum = exponentials(scores, count, shift);
      if (!first) {
        const Vec fade = weight_of(before, shift);
        total[v] = total[v] * fade + sum;
        for (int64_t c = 0; c < head_dim; ++c) {
          float* at = out + c * kPanel + v * kLanes;
          store(at, load(at) * fade);
        }
      } else {
        total[v] = sum;
      }
      if (a.drop)
        for (int64_t j = 0; j < count; ++j) {
          float* at = scores + j * kPanel;
          store(at, a.drop(load(at), a.position(batch, head, q.begin + v * kLanes, k0 + j), a.see.keys));
        }
    }
    const WordT* weights;
    if constexpr (kElements<WordT> == 1) weights = scratch.scores;
    else weights = as_words(scratch.scores, count, lanes, scratch.pairs);
    const int64_t rest = count - whole * width;
    for (int64_t c = 0; c < head_dim; c += kRows<WordT>) {
      const int64_t rows = smaller<int64_t>(kRows<WordT>, head_dim - c);
      float* at = out + c * kPanel;
      if (whole > 0)
        tile_rows(rows, values.channels(k0, width, whole).rows_from(c), weights, kPanel, lanes, at, kPanel, !first, chain);
      if (rest > 0)
        tile_rows(rows, values.channels(k0 + whole * width, rest).rows_from(c),
                  weights + whole * width / kElements<WordT> * kPanel, kPanel, lanes, at, kPanel, !first || whole > 0, chain);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    // A query that sees no key attends to nothing. Without anything that could hide keys a sum of 0 comes from scores that
    // are -inf themselves: NaN, as a softmax gives.
    const Vec factor = a.see.can_hide() ? choose(total[v] == 0.f, Vec{}, 1.f / total[v]) : 1.f / total[v];
    for (int64_t c = 0; c < head_dim; ++c) {
      float* at = out + c * kPanel + v * kLanes;
      store(at, first ? Vec{} : load(at) * factor);
    }
    if (statistics == nullptr) continue;
    float* at = statistics + q.begin + v * kLanes;
    store_part(at, choose(maximum[v] == kNever, Vec{}, maximum[v]), lanes - v * kLanes);
    store_part(at + a.see.queries, factor, lanes - v * kLanes);
  }
}

}  // namespace macaron_ops::MACARON_OPS_ISA

// Gradients of attention, one head of keys and the heads of queries that share it, in blocks of 64 queries by 512 keys
// that are computed again (Dao 2023, arXiv 2307.08691). Lanes are keys here: four of the five products then take and
// give panels as they lie, and what belongs to a query is one number per row.
//
//   P[query][key] = e^(S - max) / sum          delta[query] = sum_c dO[query][c] O[query][c]
//   dP = dO V^T      dS = P (drop(dP) - delta)      dV^T += dO^T drop(P)      dK^T += Q^T dS      dQ += dS K
//
// FLOP: 10 head_dim per query and key.
#pragma once

#include "attention_forward.h"

namespace macaron_ops::MACARON_OPS_ISA {

constexpr int64_t kQueryBlock = 2 * kPanel;
constexpr int64_t kMostKeys = 16 * kPanel;  // of a block: its weights and their gradients stay in the L2 cache
constexpr int64_t kGroup = kQueryBlock * kPanel;  // words of a group: a block of queries by a panel of keys

// Words [rows][lanes] to [lanes][rows].
static inline void transpose_words(const float* in, int64_t from_row, int64_t rows, int64_t lanes, float* out,
                                   int64_t to_row) {
  for (int64_t l = 0; l < lanes; l += kLanes)
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t down = smaller<int64_t>(kLanes, rows - r);
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = i < down ? load_part(in + (r + i) * from_row + l, lanes - l) : Vec{};
      transpose(v);
      for (int64_t i = 0; i < smaller<int64_t>(kLanes, lanes - l); ++i) store_part(out + (l + i) * to_row + r, v[i], down);
    }
}

// Keys in rows, [tokens / kElements][round_up(head_dim, kLanes)] words along tokens, from words along channels.
static inline void rows_of_keys(const float* lanes, int64_t width, int64_t head_dim, int64_t count, float* out, float*) {
  transpose_words(lanes, width, head_dim, count, out, round_up(head_dim, kLanes));
}
static inline void rows_of_keys(const Pair* lanes, int64_t width, int64_t head_dim, int64_t count, Pair* out,
                                float* rows) {
  const int64_t row = round_up(head_dim, 2 * kLanes) / 2;
  transpose_words(reinterpret_cast<const float*>(lanes), width, words_of<Pair>(head_dim), count, rows, row);
  for (int64_t i = 0; i < row; ++i) rows[count * row + i] = 0.f;  // the other half of the last pair
  const bf16* elements = reinterpret_cast<const bf16*>(rows);
  for (int64_t j = 0; j < count; j += 2)
    for (int64_t c = 0; c < round_up(head_dim, kLanes); c += kLanes)
      store_words(out + j / 2 * round_up(head_dim, kLanes) + c, load(elements + 2 * j * row + c),
                  load(elements + 2 * (j + 1) * row + c));
}

// The same panels with their pairs along the other dimension; nothing to do for float.
template <class WordT>
static Head<WordT> turned(const Head<WordT>& head, bool, WordT*) { return head; }
static inline Head<Pair> turned(const Head<Pair>& head, bool by_token, Pair* out) {
  const HeadPanels& at = head.at;
  for (int64_t p = 0; p < at.panels; ++p) {
    const bf16* from = head.elements() + p * at.size * 2;
    bf16* to = reinterpret_cast<bf16*>(out + p * at.size);
    const int64_t tokens = smaller(at.width, at.tokens - p * at.width);
    for (int64_t c = 0; c < at.head_dim; c += 2)
      for (int64_t t = 0; t < tokens; t += kLanes) {
        const bool second = c + 1 < at.head_dim;
        if (by_token) {
          VecU pair;
          std::memcpy(&pair, from + (c / 2 * at.width + t) * 2, sizeof pair);
          if (t + kLanes > tokens) pair &= (VecU)(counting() < int32_t(tokens - t));
          store_part(to + c * at.width + t, of_bits(pair << 16), at.width - t);
          if (second) store_part(to + (c + 1) * at.width + t, of_bits(pair & 0xffff0000u), at.width - t);
        } else {
          const Vec first = load_part(from + c * at.width + t, tokens - t);
          const Vec other = second ? load_part(from + (c + 1) * at.width + t, tokens - t) : Vec{};
          store_part(reinterpret_cast<Pair*>(to) + c / 2 * at.width + t, bits_of(first) >> 16 | bits_of(other), tokens - t);
        }
      }
  }
  return {out, at};
}

// What a thread works with; sized for one head of keys with all its tokens.
template <class WordT>
struct BackwardScratch {
  using Element = typename Arithmetic<WordT>::Element;
  static constexpr bool kTurns = kElements<WordT> > 1;

  int64_t keys;                  // of a block
  Buffer<WordT> q, grad, v;      // pairs along the other dimension
  Buffer<WordT> key_rows, words;
  Buffer<float> rows;
  Buffer<float> p, ds, masks;    // [panels of keys][kQueryBlock][kPanel]
  Buffer<bf16> elements;         // the same, of ds
  Buffer<float> delta;           // [queries]
  Buffer<float> grad_q;          // [queries][round_up(head_dim, kLanes)]
  Buffer<float> grad_k, grad_v;  // [panels of keys][head_dim][kPanel]

  BackwardScratch(const Host& host, const HeadPanels& queries, const HeadPanels& all_keys, bool masked)
      : keys(smaller(kMostKeys, all_keys.blocks() * kPanel)),
        q(host, kTurns ? queries.words() + kSlack : 0),
        grad(host, kTurns ? queries.words() + kSlack : 0),
        v(host, kTurns ? all_keys.words() + kSlack : 0),
        key_rows(host, keys * round_up(all_keys.head_dim, kLanes)),
        words(host, kTurns ? kGroup / 2 : 0),
        rows(host, kTurns ? (kPanel + 1) * round_up(all_keys.head_dim, 2 * kLanes) : 0),
        p(host, keys / kPanel * kGroup),
        ds(host, keys / kPanel * kGroup),
        masks(host, masked ? keys / kPanel * kGroup : 0),
        elements(host, kTurns ? keys / kPanel * kGroup : 0),
        delta(host, queries.tokens),
        grad_q(host, round_up(queries.tokens, kLanes) * round_up(queries.head_dim, kLanes)),
        grad_k(host, all_keys.blocks() * all_keys.head_dim * kPanel + kLanes),
        grad_v(host, all_keys.blocks() * all_keys.head_dim * kPanel + kLanes) {}
};

// What a call's backward pass adds to the gradients of learned masks.
struct MaskGradients {
  float *pairs, *keys;  // null where not needed
  int64_t strides[4];   // of pairs

  explicit operator bool() const { return pairs != nullptr || keys != nullptr; }
  // What a mask is shared by is summed over the tile first: one chain through all queries and keys would gather the
  // rounding errors of every partial sum, and the terms cancel.
  void add(int64_t batch, int64_t head, int64_t num_keys, Range q, Range k, const float* ds) const {
    const int64_t queries = q.end - q.begin, lanes = k.end - k.begin;
    float of_queries[kQueryBlock], of_keys[kPanel] = {}, of_tile = 0.f;
    for (int64_t i = 0; i < queries; ++i) {
      Vec row = {};
      for (int64_t l = 0; l < lanes; l += kLanes) {
        const Vec v = load(ds + i * kPanel + l);
        row += v;
        store(of_keys + l, load(of_keys + l) + v);
      }
      of_queries[i] = sum(row);
      of_tile += of_queries[i];
    }
    for (int64_t j = 0; j < lanes && keys != nullptr; ++j) keys[batch * num_keys + k.begin + j] += of_keys[j];
    if (pairs == nullptr) return;
    const int64_t per_query = strides[2], per_key = strides[3];
    float* at = pairs + batch * strides[0] + head * strides[1] + q.begin * per_query + k.begin * per_key;
    if (per_query == 0 && per_key == 0) {
      *at += of_tile;
    } else if (per_query == 0) {
      for (int64_t j = 0; j < lanes; ++j) at[j * per_key] += of_keys[j];
    } else if (per_key == 0) {
      for (int64_t i = 0; i < queries; ++i) at[i * per_query] += of_queries[i];
    } else {
      for (int64_t i = 0; i < queries; ++i)
        for (int64_t j = 0; j < lanes; ++j) at[i * per_query + j * per_key] += ds[i * kPanel + j];
    }
  }
};

// Weights of a block of queries and keys, and the gradients of scores, in place, in groups: from scores p becomes
// drop(P), from the gradients in that dp becomes dS = P (drop(dP) - delta). Lanes beyond the keys become 0. Where the
// block has every key, delta is the sum of P drop(dP), so that the terms cancel as those of a softmax do; else it is
// given.
template <class X>
struct WeightsBackward {
  const Attention<X>& a;
  int64_t batch, head;
  Range q, k;
  const float *shift, *factor, *delta;  // of all queries
  const float* masks;                   // null: none given
  float *p, *dp;

  void operator()(bool every_key) const {
    // Nearly all blocks are whole, and nothing in them is masked or dropped.
    const bool plain = (k.end - k.begin) % kLanes == 0 && masks == nullptr && !a.drop && a.see.whole(q, k);
    for (int64_t i = 0; i < q.end - q.begin; ++i) {
      const float total = plain ? weights<true>(i) : weights<false>(i);
      const float row_delta = every_key ? total : delta[q.begin + i];
      plain ? scores<true>(i, row_delta) : scores<false>(i, row_delta);
    }
  }

 private:
  static int64_t place(int64_t i, int64_t l) { return l / kPanel * kGroup + i * kPanel + l % kPanel; }

  // p and dp of row i become the weights, negative where they are dropped, and drop(dP); returns the sum of P drop(dP).
  template <bool plain>
  float weights(int64_t i) const {
    const int64_t query = q.begin + i;
    const Vec row_shift = broadcast(shift[query]), row_factor = broadcast(factor[query]);
    Vec products = {};
    for (int64_t l = 0; l < k.end - k.begin; l += kLanes) {
      const int64_t at = place(i, l);
      Vec s = rounded(load(p + at) * a.scale), grad = load(dp + at);
      if constexpr (!plain) {
        s = seen(s, query, at, l);
        grad = choose(counting() < int32_t(k.end - k.begin - l), grad, Vec{});
      }
      Vec weight = weight_of(s, row_shift) * row_factor;
      if (!plain && a.drop) {
        const VecI kept = a.drop.kept(a.position(batch, head, query, k.begin + l));
        grad = a.drop.scaled(grad, kept);
        products += weight * grad;
        weight = choose(kept, weight, -weight);
      } else {
        products += weight * grad;
      }
      store(p + at, weight);
      store(dp + at, grad);
    }
    return sum(products);
  }

  // And these become drop(P) and dS.
  template <bool plain>
  void scores(int64_t i, float row_delta) const {
    for (int64_t l = 0; l < k.end - k.begin; l += kLanes) {
      const int64_t at = place(i, l);
      Vec weight = load(p + at);
      if (!plain && a.drop) {
        store(p + at, a.drop.scaled(weight, (VecI)bits_of(weight) >= 0));
        weight = absolute(weight);
      }
      store(dp + at, weight * (load(dp + at) - row_delta));
    }
  }

  Vec seen(Vec s, int64_t query, int64_t at, int64_t l) const {
    if (masks != nullptr) s = masked(s, load(masks + at));
    const int64_t first = k.begin + l;
    const int32_t lower = int32_t(a.see.lower(query) - first), upper = int32_t(smaller(a.see.upper(query), k.end) - first);
    return choose((counting() >= lower) & (counting() < upper), s, broadcast(kNever));
  }
};

// delta of all queries: `attended` are panels of all tokens, `token` the sequence's first one there, `feature` the
// head's first channel of `features`.
template <class WordT, class W>
static void dots(const Head<WordT>& grad, const W* attended, int64_t features, int64_t feature, int64_t token,
                 float* delta) {
  const HeadPanels& at = grad.at;
  for (int64_t t = 0; t < at.tokens;) {
    const int64_t lane = (token + t) % kPanel;
    const int64_t count = smaller(smaller(smaller<int64_t>(kPanel - lane, kPanel - t % kPanel), at.tokens - t), int64_t(kLanes));
    const W* o = attended + ((token + t) / kPanel * features + feature) * kPanel + lane;
    Vec sums[4] = {};  // as for the weights' sum
    for (int64_t c = 0; c < at.head_dim; c += kElements<WordT>) {
      const WordT* g = grad.lanes(t) + c / kElements<WordT> * at.width;
      if constexpr (kElements<WordT> == 1) {
        sums[c % 4] += load(g) * load_part(o + c * kPanel, count);
      } else {
        VecU pair;
        std::memcpy(&pair, g, sizeof pair);
        sums[c % 4] += of_bits(pair << 16) * load_part(o + c * kPanel, count);
        if (c + 1 < at.head_dim) sums[c % 4 + 1] += of_bits(pair & 0xffff0000u) * load_part(o + (c + 1) * kPanel, count);
      }
    }
    const Vec total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    store_part(delta + t, total, count);
    t += count;
  }
}

// sums [head_dim][kPanel] += the sum over queries of left[channel][query] right[query][key].
template <class WordT>
static void add_over_queries(const Head<WordT>& left, Range q, const float* right, int64_t lanes, WordT* words, float* sums,
                             int64_t chain) {
  const int64_t width = left.at.width, whole = (q.end - q.begin) / width, rest = (q.end - q.begin) % width;
  const WordT* b;
  if constexpr (kElements<WordT> == 1) b = right;
  else b = as_words(right, q.end - q.begin, lanes, words);
  for (int64_t c = 0; c < left.at.head_dim; c += kRows<WordT>) {
    const int64_t rows = smaller<int64_t>(kRows<WordT>, left.at.head_dim - c);
    float* at = sums + c * kPanel;
    if (whole > 0) tile_rows(rows, left.channels(q.begin, width, whole).rows_from(c), b, kPanel, lanes, at, kPanel, true, chain);
    if (rest > 0)
      tile_rows(rows, left.channels(q.begin + whole * width, rest).rows_from(c),
                b + whole * width / kElements<WordT> * kPanel, kPanel, lanes, at, kPanel, true, chain);
  }
}

// One head of queries: fills scratch.grad_q, adds to scratch.grad_k and grad_v; none of them is multiplied by the scale
// of the scores. Heads are by channel, but `values` by token.
template <class WordT, class X>
static void attend_backward(const Attention<X>& a, int64_t batch, int64_t head, const Head<WordT>& queries,
                            const Head<WordT>& keys, const Head<WordT>& values, const Head<WordT>& grad,
                            const float* statistics, const MaskGradients& mask_gradients,
                            BackwardScratch<WordT>& scratch) {
  using Element = typename Arithmetic<WordT>::Element;
  constexpr int step = kElements<WordT>;
  const int64_t head_dim = queries.at.head_dim, padded = round_up(head_dim, kLanes);
  const Head<WordT> q_by_token = turned(queries, true, static_cast<WordT*>(scratch.q));
  const Head<WordT> grad_by_token = turned(grad, true, static_cast<WordT*>(scratch.grad));
  const float *shift = statistics, *factor = statistics + a.see.queries, *delta = scratch.delta;
  for (int64_t i = 0; i < queries.at.tokens * padded; ++i) scratch.grad_q[i] = 0.f;

  const bool given = a.see.has_given(), every_key = keys.at.tokens <= kMostKeys;
  const int64_t width = queries.at.width, chain = chain_for(a.see.queries, a.see.keys);
  const int64_t over_queries = chain_over(a.see.queries, head_dim), over_keys = chain_over(a.see.keys, head_dim);
  for (int64_t k0 = 0; k0 < keys.at.tokens; k0 += kMostKeys) {
    const Range block{k0, smaller(k0 + kMostKeys, keys.at.tokens)};
    for (int64_t k = k0; k < block.end; k += kPanel)
      rows_of_keys(keys.lanes(k), keys.at.width, head_dim, smaller<int64_t>(kPanel, block.end - k),
                   scratch.key_rows + (k - k0) / step * padded, static_cast<float*>(scratch.rows));
    const Range all = a.see.queries_of(block.begin, block.end);
    for (int64_t q0 = all.begin / width * width; q0 < all.end; q0 += kQueryBlock) {
      const Range q{q0, smaller(q0 + kQueryBlock, all.end)}, seen = a.see.keys_of(q.begin, q.end);
      // Keys that one of these queries sees, from a whole panel on.
      const Range k{larger(block.begin, seen.begin / kPanel * kPanel), smaller(block.end, seen.end)};
      if (k.begin >= k.end) continue;
      const int64_t count = q.end - q.begin, groups = ceil_div(k.end - k.begin, kPanel);
      for (int64_t g = 0; g < groups; ++g) {
        const Range of_group{k.begin + g * kPanel, smaller(k.begin + (g + 1) * kPanel, k.end)};
        const int64_t key = of_group.begin, lanes = of_group.end - key;
        float *p = scratch.p + g * kGroup, *ds = scratch.ds + g * kGroup;
        for (int64_t query = q.begin; query < q.end; query += width)
          for (int64_t r = 0; r < smaller(width, q.end - query); r += kRows<WordT>) {
            const int64_t rows = smaller<int64_t>(kRows<WordT>, smaller(width, q.end - query) - r);
            const int64_t at = (query - q0 + r) * kPanel;
            tile_rows(rows, queries.rows(query + r), keys.lanes(key), keys.at.width, lanes, p + at, kPanel, false, chain);
            tile_rows(rows, grad.rows(query + r), values.lanes(key), values.at.width, lanes, ds + at, kPanel, false, chain);
          }
        if (given) a.see.fill(batch, head, q, of_group, false, scratch.masks + g * kGroup);
      }
      WeightsBackward<X>{a, batch, head, q, k, shift, factor, delta, given ? static_cast<float*>(scratch.masks) : nullptr,
                         scratch.p, scratch.ds}(every_key);
      for (int64_t g = 0; g < groups; ++g) {
        const Range of_group{k.begin + g * kPanel, smaller(k.begin + (g + 1) * kPanel, k.end)};
        const int64_t lanes = of_group.end - of_group.begin;
        float *p = scratch.p + g * kGroup, *ds = scratch.ds + g * kGroup;
        if (mask_gradients) mask_gradients.add(batch, head, keys.at.tokens, q, of_group, ds);
        add_over_queries<WordT>(grad_by_token, q, p, lanes, scratch.words, scratch.grad_v + of_group.begin * head_dim, over_queries);
        add_over_queries<WordT>(q_by_token, q, ds, lanes, scratch.words, scratch.grad_k + of_group.begin * head_dim, over_queries);
        if constexpr (step == 2)
          for (int64_t i = 0; i < count * kPanel; i += kLanes) store(scratch.elements + g * kGroup + i, load(ds + i));
      }
      const Element* left;
      if constexpr (step == 1) left = scratch.ds;
      else left = scratch.elements;
      const WordT* right = scratch.key_rows + (k.begin - k0) / step * padded;
      const int64_t whole = (k.end - k.begin) / kPanel, rest = (k.end - k.begin) % kPanel;
      for (int64_t r = 0; r < count; r += kRows<WordT>)
        for (int64_t c = 0; c < head_dim; c += kPanel) {
          const int64_t rows = smaller<int64_t>(kRows<WordT>, count - r), lanes = smaller<int64_t>(kPanel, padded - c);
          float* at = scratch.grad_q + (q0 + r) * padded + c;
          if (whole > 0)
            tile_rows(rows, Left<Element>{left + r * kPanel, kPanel, step, kPanel / step, whole, kGroup}, right + c, padded,
                      lanes, at, padded, true, over_keys);
          if (rest > 0)
            tile_rows(rows, Left<Element>{left + whole * kGroup + r * kPanel, kPanel, step, words_of<WordT>(rest)},
                      right + whole * kPanel / step * padded + c, padded, lanes, at, padded, true, over_keys);
        }
    }
  }
}

}  // namespace macaron_ops::MACARON_OPS_ISA

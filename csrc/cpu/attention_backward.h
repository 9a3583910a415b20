// Gradients of attention, one head of keys and the heads of queries that share it, in blocks of 64 queries by 64 keys
// that are computed again (Dao 2023, arXiv 2307.08691). Lanes are keys here: four of the five products then take and
// give panels as they lie, and what belongs to a query is one number per row.
//
//   P[query][key] = 2^(S - max) / sum          delta[query] = sum_c dO[query][c] O[query][c]
//   dP = dO V^T      dS = P (drop(dP) - delta)      dV^T += dO^T drop(P)      dK^T += Q^T dS      dQ += dS K
//
// FLOP: 10 head_dim per query and key.
#pragma once

#include "attention_forward.h"

namespace macaron_ops::MACARON_OPS_ISA {

constexpr int64_t kQueryBlock = 2 * kPanel;
constexpr int kGroups = 2;  // panels of keys in a block

// Whole numbers side by side.
MACARON_INLINE VecI counting_from(int64_t start) {
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = int32_t(start) + i;
  return v;
}

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
          if (t + kLanes > tokens) pair &= (VecU)(counting_from(t) < int32_t(tokens));
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

  Buffer<WordT> q, grad, v;     // pairs along the other dimension
  Buffer<WordT> key_rows;
  Buffer<float> rows;
  Buffer<float> delta;          // [queries]
  Buffer<float> grad_q;         // [queries][round_up(head_dim, kLanes)]
  Buffer<float> grad_k, grad_v; // [blocks of kPanel keys][head_dim][kPanel]
  alignas(64) float p[kGroups][kQueryBlock * kPanel];
  alignas(64) float ds[kGroups][kQueryBlock * kPanel];
  alignas(64) float masks[kQueryBlock * kPanel];
  alignas(64) Pair words[kQueryBlock / 2 * kPanel];
  alignas(64) bf16 elements[kGroups][kQueryBlock * kPanel];

  BackwardScratch(const Host& host, const HeadPanels& queries, const HeadPanels& keys)
      : q(host, kTurns ? queries.words() + kSlack : 0),
        grad(host, kTurns ? queries.words() + kSlack : 0),
        v(host, kTurns ? keys.words() + kSlack : 0),
        key_rows(host, kGroups * kPanel * round_up(keys.head_dim, kLanes)),
        rows(host, kTurns ? (kPanel + 1) * round_up(keys.head_dim, 2 * kLanes) : 0),
        delta(host, queries.tokens),
        grad_q(host, round_up(queries.tokens, kLanes) * round_up(queries.head_dim, kLanes)),
        grad_k(host, keys.blocks() * keys.head_dim * kPanel),
        grad_v(host, keys.blocks() * keys.head_dim * kPanel) {}
};

// What a call's backward pass adds to the gradients of learned masks.
struct MaskGradients {
  float *pairs, *keys;  // null where not needed
  int64_t strides[4];   // of pairs

  explicit operator bool() const { return pairs != nullptr || keys != nullptr; }
  void add(int64_t batch, int64_t head, int64_t num_keys, Range q, Range k, const float* ds) const {
    for (int64_t i = q.begin; i < q.end; ++i)
      for (int64_t j = k.begin; j < k.end; ++j) {
        const float value = ds[(i - q.begin) * kPanel + j - k.begin];
        if (pairs != nullptr) pairs[batch * strides[0] + head * strides[1] + i * strides[2] + j * strides[3]] += value;
        if (keys != nullptr) keys[batch * num_keys + j] += value;
      }
  }
};

// Weights and the gradients of scores of a block of queries and at most kPanel keys, from scores and the gradients of
// dropped weights, in place: p becomes drop(P), dp becomes dS. Lanes beyond the keys become 0.
template <class X>
static void weights_backward(const Attention<X>& a, int64_t batch, int64_t head, Range q, Range k, const float* shift,
                             const float* factor, const float* delta, const float* masks, float* p, float* dp) {
  const bool border = !a.see.whole(q, k);
  const float scale = a.scale * kLog2E;
  for (int64_t l = 0; l < k.end - k.begin; l += kLanes) {
    const VecI key = counting_from(k.begin + l);
    const VecI there = key < int32_t(k.end);
    for (int64_t i = 0; i < q.end - q.begin; ++i) {
      const int64_t query = q.begin + i;
      float *at_p = p + i * kPanel + l, *at_dp = dp + i * kPanel + l;
      Vec s = load(at_p) * scale;
      if (masks != nullptr) {
        const Vec mask = load(masks + i * kPanel + l);
        s = choose(mask == kNever, mask, s + mask * kLog2E);
      }
      VecI seen = there;
      if (border) seen &= (key >= int32_t(a.see.lower(query))) & (key < int32_t(a.see.upper(query)));
      s = choose(seen, s, broadcast(kNever));
      Vec weight = exp2(s - shift[query]) * factor[query];
      Vec grad = choose(there, load(at_dp), Vec{}), dropped = weight;
      if (a.drop) {
        const VecI kept = a.drop.kept(a.position(batch, head, query, k.begin + l));
        dropped = a.drop.scaled(weight, kept);
        grad = a.drop.scaled(grad, kept);
      }
      store(at_p, dropped);
      store(at_dp, weight * (grad - delta[query]));
    }
  }
}

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
    Vec total = {};
    for (int64_t c = 0; c < at.head_dim; c += kElements<WordT>) {
      const WordT* g = grad.lanes(t) + c / kElements<WordT> * at.width;
      if constexpr (kElements<WordT> == 1) {
        total += load(g) * load_part(o + c * kPanel, count);
      } else {
        VecU pair;
        std::memcpy(&pair, g, sizeof pair);
        total += of_bits(pair << 16) * load_part(o + c * kPanel, count);
        if (c + 1 < at.head_dim) total += of_bits(pair & 0xffff0000u) * load_part(o + (c + 1) * kPanel, count);
      }
    }
    store_part(delta + t, total, count);
    t += count;
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

  for (int64_t k0 = 0; k0 < keys.at.tokens; k0 += kGroups * kPanel) {
    const Range block{k0, smaller(k0 + kGroups * kPanel, keys.at.tokens)};
    const int groups = int(ceil_div(block.end - block.begin, kPanel));
    Range group[kGroups];
    for (int g = 0; g < groups; ++g) {
      group[g] = {k0 + g * kPanel, smaller(k0 + (g + 1) * kPanel, block.end)};
      rows_of_keys(keys.lanes(group[g].begin), keys.at.width, head_dim, group[g].end - group[g].begin,
                   scratch.key_rows + g * (kPanel / step) * padded, static_cast<float*>(scratch.rows));
    }
    const Range all = a.see.queries_of(block.begin, block.end);
    const int64_t width = queries.at.width;
    for (int64_t q0 = all.begin / width * width; q0 < all.end; q0 += kQueryBlock) {
      const Range q{q0, smaller(q0 + kQueryBlock, all.end)};
      const int64_t count = q.end - q.begin, whole = count / width, rest = count % width;
      for (int g = 0; g < groups; ++g) {
        const Range k = group[g];
        const int64_t lanes = k.end - k.begin;
        float *p = scratch.p[g], *ds = scratch.ds[g];
        for (int64_t query = q.begin; query < q.end; query += width)
          for (int64_t r = 0; r < smaller(width, q.end - query); r += kRows) {
            const int64_t rows = smaller<int64_t>(kRows, smaller(width, q.end - query) - r);
            const int64_t at = (query - q0 + r) * kPanel;
            tile_rows(rows, queries.rows(query + r), keys.lanes(k.begin), keys.at.width, lanes, p + at, kPanel, false);
            tile_rows(rows, grad.rows(query + r), values.lanes(k.begin), values.at.width, lanes, ds + at, kPanel, false);
          }
        const bool given = a.see.has_given();
        if (given) a.see.fill(batch, head, q, k, false, scratch.masks);
        weights_backward(a, batch, head, q, k, shift, factor, delta, given ? scratch.masks : nullptr, p, ds);
        if (mask_gradients) mask_gradients.add(batch, head, keys.at.tokens, q, k, ds);
        float* const sums[2] = {scratch.grad_v + k.begin * head_dim, scratch.grad_k + k.begin * head_dim};
        const Head<WordT>* const lefts[2] = {&grad_by_token, &q_by_token};
        float* const rights[2] = {p, ds};
        for (int which = 0; which < 2; ++which) {
          const WordT* right;
          if constexpr (step == 1) right = rights[which];
          else right = as_words(rights[which], count, lanes, scratch.words);
          for (int64_t c = 0; c < head_dim; c += kRows) {
            const int64_t rows = smaller<int64_t>(kRows, head_dim - c);
            if (whole > 0)
              tile_rows(rows, lefts[which]->channels(q0, width, whole).rows_from(c), right, kPanel, lanes,
                        sums[which] + c * kPanel, kPanel, true);
            if (rest > 0)
              tile_rows(rows, lefts[which]->channels(q0 + whole * width, rest).rows_from(c),
                        right + whole * width / step * kPanel, kPanel, lanes, sums[which] + c * kPanel, kPanel, true);
          }
        }
        if constexpr (step == 2)
          for (int64_t i = 0; i < count * kPanel; i += kLanes) store(scratch.elements[g] + i, load(ds + i));
      }
      const Element* left;
      if constexpr (step == 1) left = scratch.ds[0];
      else left = scratch.elements[0];
      for (int64_t r = 0; r < count; r += kRows) {
        const int64_t rows = smaller<int64_t>(kRows, count - r);
        for (int64_t c = 0; c < head_dim; c += kPanel) {
          float* at = scratch.grad_q + (q0 + r) * padded + c;
          const int64_t lanes = smaller<int64_t>(kPanel, padded - c);
          for (int g = 0; g < groups; ++g) {
            const Left<Element> a_rows{left + g * kQueryBlock * kPanel + r * kPanel, kPanel, step,
                                       words_of<WordT>(group[g].end - group[g].begin)};
            tile_rows(rows, a_rows, scratch.key_rows + g * (kPanel / step) * padded + c, padded, lanes, at, padded, true);
          }
        }
      }
    }
  }
}

}  // namespace macaron_ops::MACARON_OPS_ISA

// What the loops of sphere_attend_step share: the particles, what of them is visible, and the weights.
//
// A loop owns one panel of particles (its lanes) and meets the others one after the other, as rows where they lie. It
// stores nothing but sums over them, so that memory stays linear. The loops:
//
//   forward   owns queries:  m_i, Z_i = sum_j e_ij and sum_j e_ij v_j,  with e_ij = 2^(t_ij - m_i),
//                            t_ij = beta log2(e) <q_i, k_j>;  u_i = sum_j e_ij v_j / Z_i
//   queries   owns queries:  sum_j a_ij k_j,  with a_ij = e_ij (<g_i, v_j> - d_i);  dq_i is beta times it;
//                            sum_j a_ij <q_i, k_j>, a term of beta's gradient
//   along     owns queries:  <g_i, v_0>, rounded as the other loops round it
//   keys      owns keys:     sum_i a_ij q_i and sum_i e_ij g_i: dk_j / beta and dv_j
//   mutual    q = k = v = x and one m for all, so that e_ij = e_ji:  sum_j b_ij x_j and sum_j e_ij g_j, with
//                            b_ij = a_ij + a_ji;  sum_j b_ij <x_i, x_j>
//
// with g_i = du_i / Z_i and d_i = <g_i, u_i> (softmax) or 0. Sums are begun anew every block of particles and added to
// a total, so that no chain of additions is as long as the particles are many.
#pragma once

#include "exp2.h"
#include "product.h"

namespace macaron_ops::MACARON_OPS_ISA {

// Particles as left operands of products: over their channels, or over the particles themselves.
template <class WordT>
struct Others {
  using Element = typename Arithmetic<WordT>::Element;

  const Element* rows;     // [count][channels]; channels are even where words are pairs
  const Element* columns;  // floats: the rows; pairs: of rows 2i and 2i + 1 element by element in turn, a last row of zeros
  int64_t channels;

  const Element* row(int64_t i) const { return rows + i * channels; }
};

// One batch element.
template <class WordT>
struct Particles {
  int64_t count_of_queries, count_of_keys;
  Others<WordT> query, key, value;
  float scale;  // beta log2(e)
  bool softmax, causal;
  bool bounded;    // no weight leaves float32's range with one m for all particles, which is `shift`
  bool skip;       // what causality hides need not be read: it is finite, so that a weight of 0 hides it
  float shift;
  float largest;   // no e_ij is larger (nor 1, where the shift is the largest score)
  float fraction;  // unnormalised and not bounded: e_ij = 2^t_ij * fraction, so that their sum stays in range
  // backward
  Others<WordT> grad_u;  // g_i
  const float* offset;   // d_i
  const float* shifts;   // m_i
};

// What its owners bring: panels.
template <class WordT>
struct Owners {
  int64_t begin, count;         // the first one's place, and how many there are in the panel
  const WordT* own;             // q, k or x
  const WordT* value;           // keys: v
  const WordT* grad_u;          // queries, mutual: g
  const float *offset, *shift;  // queries, mutual: d, m
};

// The sums that a loop leaves for its owners.
//
// d_i is <g_i, u_i>, but where one weight is nearly 1, <g_i, v_j> - d_i is a small difference of two sums that were not
// rounded alike. There queries also leaves sum_j a_ij, which has to be 0: what it is instead, over Z_i, is the error of
// d_i, which is settled by adding it, and the sums of a_ij are by taking off as many times those of e_ij: sum_j e_ij k_j,
// which is Z_i u_i where keys are values, and else the second sum that queries leaves.
struct Sums {
  float *first, *second;         // panels; which ones, the loop's comment says
  bool need_first, need_second, settle;  // settle: queries leaves excess and mean
  float *shift, *total;          // forward: m_i, Z_i
  float *excess;                 // queries: sum_j a_ij
  float *slope, *mean;           // queries: sum_j a_ij <q_i, k_j>, sum_j e_ij <q_i, k_j>; mutual: slope
};

template <class WordT>
struct Loops {
  using Loop = void (*)(const Particles<WordT>&, const Owners<WordT>&, const Sums&, float* scratch);
  using Along = void (*)(const Particles<WordT>&, const Owners<WordT>&, float* along);
  Loop forward, queries, keys, mutual;
  Along along;
};

// Weights that are added one after the other in Z_i, which is a sum of such sums. Equal keys have equal weights, and
// roundings of a chain of equal terms go one way; a softmax that takes the largest score off adds ones, and rounds nothing.
constexpr int64_t kFew = 8;

// Which others the lanes of a vector or panel see.
struct Visible {
  int64_t begin, end;          // those that any lane sees, or has to read
  int64_t all_begin, all_end;  // those that every lane sees
};

template <class WordT>
MACARON_INLINE Visible visible_keys(const Particles<WordT>& p, int64_t query, int64_t lanes) {
  const int64_t keys = p.count_of_keys;
  if (!p.causal) return {0, keys, 0, keys};
  return {0, p.skip ? smaller(keys, query + lanes) : keys, 0, smaller(keys, query + 1)};
}
template <class WordT>
MACARON_INLINE Visible visible_queries(const Particles<WordT>& p, int64_t key, int64_t lanes) {
  const int64_t queries = p.count_of_queries;
  if (!p.causal) return {0, queries, 0, queries};
  return {p.skip ? smaller(queries, key) : 0, queries, smaller(queries, key + lanes - 1), queries};
}

// Which of kLanes queries from `query` on see key `key`; which of kLanes keys from `key` on are seen by query `query`.
MACARON_INLINE VecI queries_seeing(int64_t query, int64_t key) { return counting() >= int32_t(key - query); }
MACARON_INLINE VecI keys_seen(int64_t key, int64_t query) { return counting() <= int32_t(query - key); }

// e_ij of <q_i, k_j>. Where a mask hides a pair e is 0, or NaN where the shift is NaN: so it is in a softmax.
template <bool bounded, bool masked>
MACARON_INLINE Vec weight(Vec score, float scale, Vec shift, float fraction, VecI seen) {
  const Vec t = score * scale - shift;
  if constexpr (bounded) {
    const Vec e = exp2_in_range(t);
    return masked ? choose(seen, e, Vec{}) : e;
  } else {
    return exp2(masked ? choose(seen, t, -__builtin_inff() - shift) : t) * fraction;
  }
}

// Whether a run of pairs is masked, as a type.
struct True {
  static constexpr bool value = true;
  constexpr operator bool() const { return true; }
};
struct False {
  static constexpr bool value = false;
  constexpr operator bool() const { return false; }
};

}  // namespace macaron_ops::MACARON_OPS_ISA

// What the loops of sphere_attend_step share: particles as floats, what of them is visible, and the weights.
//
// A loop owns one panel of particles (its lanes, contiguous channels [channels][kPanel]) and meets the others one after
// the other, as rows where they lie. It stores nothing but sums over them, so that memory stays linear. The loops:
//
//   forward   owns queries:  m_i, Z_i = sum_j e_ij and sum_j e_ij v_j,  with e_ij = 2^(t_ij - m_i),
//                            t_ij = beta log2(e) <q_i, k_j>;  u_i = sum_j e_ij v_j / Z_i
//   queries   owns queries:  sum_j a_ij k_j,  with a_ij = e_ij (<g_i, v_j> - d_i);  dq_i is beta times it
//   keys      owns keys:     sum_i a_ij q_i and sum_i e_ij g_i: dk_j / beta and dv_j
//   mutual    q = k = v = x and one m for all, so that e_ij = e_ji:  sum_j (a_ij + a_ji) x_j and sum_j e_ij g_j
//
// with g_i = du_i / Z_i and d_i = <du_i, u_i> / Z_i (softmax) or 0. Sums are begun anew every block of particles and
// added to a total, so that their errors grow with the square root of a block and not of all particles.
#pragma once

#include "exp2.h"
#include "product.h"

namespace macaron_ops::MACARON_OPS_ISA {

// One batch element.
struct Particles {
  int64_t rows, keys;
  int64_t channels, width;           // floats in a row of query and key; of value and grad_u
  const float *query, *key, *value;  // the rows
  bool softmax, causal;
  bool bounded;      // no weight leaves float32's range with one m for all particles, which is `shift`
  bool skip;         // what causality hides need not be read: it is finite, so that a weight of 0 hides it
  float shift;
  float fraction;    // unnormalised and not bounded: e_ij = 2^t_ij * fraction, so that their sum stays in range
  // backward
  const float* grad_u;   // rows of g_i
  const float* offset;   // d_i
  const float* shifts;   // m_i
};

// The sums that a loop leaves for its owners.
struct Sums {
  float *first, *second;  // panels; which ones, the loop's comment says
  float *shift, *total;   // forward: m_i, Z_i
  bool need_first, need_second;
};

// What its owners bring: panels; those to be multiplied with `key` (or `query`) carry the factor beta log2(e).
struct Owners {
  int64_t begin, count;       // the first one's place, and how many there are in the panel
  const float* scaled;        // q, k or x
  const float* plain;         // keys: v; mutual: x
  const float* grad_u;        // queries, mutual: g
  const float *offset, *shift;  // queries, mutual: d, m
};

using Loop = void (*)(const Particles&, const Owners&, const Sums&, float* scratch);
struct Loops {
  Loop forward, queries, keys, mutual;
  int64_t scratch;  // floats
};

// Of a panel's vector whose first lane is particle `begin`: which others its lanes see. Between `all` and `some` (or
// `some` and `all`, for keys) some lanes do and some do not.
struct Visible {
  int64_t begin, end;  // others that any lane sees, or has to read
  int64_t all_begin, all_end;  // others that every lane sees
};

MACARON_INLINE Visible visible_keys(const Particles& p, int64_t query, int64_t lanes) {
  if (!p.causal) return {0, p.keys, 0, p.keys};
  return {0, p.skip ? smaller(p.keys, query + lanes) : p.keys, 0, smaller(p.keys, query + 1)};
}
MACARON_INLINE Visible visible_queries(const Particles& p, int64_t key, int64_t lanes) {
  if (!p.causal) return {0, p.rows, 0, p.rows};
  return {p.skip ? smaller(p.rows, key) : 0, p.rows, smaller(p.rows, key + lanes - 1), p.rows};
}

MACARON_INLINE VecI lane_numbers() {
  VecI lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}
// Which of kLanes queries from `query` on see key `key`; which of kLanes keys from `key` on are seen by query `query`.
MACARON_INLINE VecI queries_seeing(int64_t query, int64_t key) { return lane_numbers() >= int32_t(key - query); }
MACARON_INLINE VecI keys_seen(int64_t key, int64_t query) { return lane_numbers() <= int32_t(query - key); }

// 2^t where t carries its shift. A hidden pair weighs 0, or NaN where the shift is NaN: so does a softmax.
template <bool bounded, bool masked>
MACARON_INLINE Vec weight(Vec t, float fraction, VecI seen) {
  if constexpr (bounded) {
    const Vec e = exp2_in_range(t);
    return masked ? choose(seen, e, Vec{}) : e;
  } else {
    return exp2(t) * fraction;
  }
}

}  // namespace macaron_ops::MACARON_OPS_ISA

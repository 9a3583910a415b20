// Which keys a query sees, and what is added to its scores. Nothing here is ever expanded to (B, H, T, S): causal order
// and packed sequences are an interval of keys per query, and of blocks at their border; given masks are read by their
// strides, one tile at a time.
#pragma once

#include "operators.h"
#include "product.h"

namespace macaron_ops::MACARON_OPS_ISA {

struct Range {
  int64_t begin, end;
};

constexpr float kNever = -__builtin_inff();  // as a score: the key is not seen

// A tile of masks holds what is added to scores. Where a boolean mask hides the key whatever its score is, it holds a
// NaN of these bits, which stand for nothing else: -inf would not do, because added to a NaN it is to give NaN.
constexpr uint32_t kBlocked = 0x7fc0b10cu;
MACARON_INLINE VecI is_blocked(Vec mask) { return (VecI)(bits_of(mask) == kBlocked); }
MACARON_INLINE Vec masked(Vec score, Vec mask) { return choose(is_blocked(mask), broadcast(kNever), score + mask); }

// `count` elements of a mask side by side, zeros beyond; true is kBlocked, and no other NaN is.
template <class T>
MACARON_INLINE Vec load_mask(const T* p, int64_t count) {
  const Vec mask = load_part(p, count);
  return choose(mask == mask, mask, broadcast(__builtin_nanf("")));
}
MACARON_INLINE Vec load_mask(const bool* p, int64_t count) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes = {};
  if (count >= kLanes) std::memcpy(&bytes, p, sizeof bytes);
  else
    for (int64_t i = 0; i < count; ++i) bytes[i] = p[i];
  return choose(__builtin_convertvector(bytes, VecI) != 0, of_bits(broadcast_bits(kBlocked)), Vec{});
}

// A blocked key stays blocked whatever is added to it.
MACARON_INLINE void add_mask(float* at, Vec mask) {
  const Vec before = load(at);
  store(at, choose(is_blocked(before) | is_blocked(mask), of_bits(broadcast_bits(kBlocked)), before + mask));
}

// tile[r][l] += the mask's element at p + r row + l lane, for `rows` rows and `lanes` lanes.
template <class T>
static void add_mask(const T* p, int64_t row, int64_t lane, int64_t rows, int64_t lanes, float* tile) {
  if (lane == 0 || lane == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t l = 0; l < lanes; l += kLanes) {
        const Vec mask = lane == 0 ? broadcast(load_mask(p + r * row, 1)[0]) : load_mask(p + r * row + l, lanes - l);
        add_mask(tile + r * kPanel + l, mask);
      }
    return;
  }
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t l = 0; l < lanes; l += kLanes) {
      Vec v[kLanes];  // of each lane the elements of kLanes rows
      for (int i = 0; i < kLanes; ++i) {
        v[i] = Vec{};
        if (l + i >= lanes) continue;
        const T* at = p + (l + i) * lane + r * row;
        if (row == 1) {
          v[i] = load_mask(at, rows - r);
        } else {
          for (int j = 0; j < kLanes && r + j < rows; ++j) v[i][j] = load_mask(at + j * row, 1)[0];
        }
      }
      transpose(v);
      for (int i = 0; i < kLanes && r + i < rows; ++i) add_mask(tile + (r + i) * kPanel + l, v[i]);
    }
}

template <class X>
struct Visibility {
  int64_t heads, queries, keys;
  bool causal;
  const int32_t *first, *last;  // of the sequence that a token belongs to, per token; null where there is one
  GivenMasks<X> given;

  int64_t lower(int64_t query) const { return first == nullptr ? 0 : first[query]; }
  int64_t upper(int64_t query) const {
    const int64_t end = last == nullptr ? keys : last[query];
    return causal ? smaller(end, query + 1) : end;
  }
  // Neither bound falls from one query to the next.
  Range keys_of(int64_t begin, int64_t end) const { return {lower(begin), upper(end - 1)}; }
  // The queries that see any of the keys begin ... end, perhaps with some that do not.
  Range queries_of(int64_t begin, int64_t end) const {
    return {causal ? begin : first == nullptr ? 0 : first[begin], last == nullptr ? queries : last[end - 1]};
  }
  // Whether all these queries see all these keys as far as intervals say.
  bool whole(Range q, Range k) const { return lower(q.end - 1) <= k.begin && k.end <= upper(q.begin); }

  bool can_hide() const { return has_given() || causal || first != nullptr; }
  bool has_given() const { return given.pairs_blocked || given.pairs_bias || given.keys_blocked || given.keys_bias; }

  // The given masks' tile of kPanel lanes a row: rows are keys and lanes are queries, or the other way round.
  void fill(int64_t batch, int64_t head, Range q, Range k, bool lanes_are_queries, float* tile) const {
    const int64_t nq = q.end - q.begin, nk = k.end - k.begin;
    const int64_t rows = lanes_are_queries ? nk : nq, lanes = lanes_are_queries ? nq : nk;
    for (int64_t i = 0; i < rows * kPanel; i += kLanes) store(tile + i, Vec{});
    const int64_t* s = given.strides;
    const int64_t at = batch * s[0] + head * s[1] + q.begin * s[2] + k.begin * s[3], at_key = batch * keys + k.begin;
    auto add = [&](const auto* p, int64_t per_query, int64_t per_key) {
      if (p == nullptr) return;
      if (lanes_are_queries) add_mask(p, per_key, per_query, rows, lanes, tile);
      else add_mask(p, per_query, per_key, rows, lanes, tile);
    };
    add(given.pairs_bias == nullptr ? nullptr : given.pairs_bias + at, s[2], s[3]);
    add(given.keys_bias == nullptr ? nullptr : given.keys_bias + at_key, 0, 1);
    add(given.pairs_blocked == nullptr ? nullptr : given.pairs_blocked + at, s[2], s[3]);
    add(given.keys_blocked == nullptr ? nullptr : given.keys_blocked + at_key, 0, 1);
  }
};

}  // namespace macaron_ops::MACARON_OPS_ISA

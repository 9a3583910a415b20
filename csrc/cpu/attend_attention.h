// The gradients of q, k and v of some sequences, from heads back to panels of tokens.
#pragma once

#include "attend_parts.h"
#include "attention_backward.h"

namespace macaron_ops::MACARON_OPS_ISA {

// Where the gradients of heads go: panels of tokens in which the first head's channels begin at `feature`.
template <class W>
struct HeadGradients {
  TokenPanels<Word<W>, Packed<W>> panels;
  int64_t feature;
};

template <class X, class W>
class AttentionBackward {
  using WordT = Word<W>;

 public:
  const AttendCall<X, W>& call;
  Sequences s;
  const Projected<WordT>&projected, &heads;  // before and after their positions
  const AllHeads<WordT>& grad;               // of the heads' outputs
  HeadGradients<W> grad_q, grad_k, grad_v;
  float* scale_sums;  // of qk_scale's gradient: [sequence][heads + kv_heads][head_dim], null: not needed

  void run(const Host& host) const {
    // A learned mask that sequences or heads share is added to by one thread.
    const AttendStep<X, W>& a = call.a;
    const bool sequences_share = a.grad_pairs_bias != nullptr && a.grad_strides[0] == 0;
    const bool heads_share = a.grad_keys_bias != nullptr || (a.grad_pairs_bias != nullptr && a.grad_strides[1] == 0);
    const int64_t per_sequence = heads_share ? a.kv_heads : 1, per_head = sequences_share ? s.count : 1;
    parallel(host, s.count / per_head * (a.kv_heads / per_sequence), [&](int64_t begin, int64_t end) {
      const TileRegisters<WordT> registers;
      BackwardScratch<WordT> scratch(host, call.q, call.kv, call.attention.see.has_given());
      const Buffer<float> blocks(host, 2 * a.head_dim * kPanel + kLanes);
      for (int64_t unit = begin; unit < end; ++unit)
        for (int64_t i = 0; i < per_head; ++i)
          for (int64_t j = 0; j < per_sequence; ++j) {
            const int64_t sequence = unit / (a.kv_heads / per_sequence) * per_head + i;
            one(sequence, unit % (a.kv_heads / per_sequence) * per_sequence + j, scratch, blocks);
          }
    });
  }

 private:
  // One head of keys and values.
  void one(int64_t sequence, int64_t kv_head, BackwardScratch<WordT>& scratch, float* blocks) const {
    const AttendStep<X, W>& a = call.a;
    const int64_t group = a.heads / a.kv_heads, batch = s.first + sequence, padded = round_up(a.head_dim, kLanes);
    const MaskGradients masks{a.grad_pairs_bias, a.grad_keys_bias,
                              {a.grad_strides[0], a.grad_strides[1], a.grad_strides[2], a.grad_strides[3]}};
    for (int64_t i = 0; i < call.kv.blocks() * a.head_dim * kPanel; i += kLanes) {
      store(scratch.grad_k + i, Vec{});
      store(scratch.grad_v + i, Vec{});
    }
    const Head<WordT> k = heads.k(sequence, kv_head), v = turned(heads.v(sequence, kv_head), false, static_cast<WordT*>(scratch.v));
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const Head<WordT> g = grad(sequence, head);
      if (a.keys > kMostKeys)
        dots(g, static_cast<const W*>(a.saved_attended), call.channels(), head * a.head_dim, batch * a.tokens,
             static_cast<float*>(scratch.delta));
      attend_backward(call.attention, batch, head, heads.q(sequence, head), k, v, g,
                      a.saved_statistics + (batch * a.heads + head) * 2 * a.tokens, masks, scratch);
      for (int64_t token = 0; token < a.tokens; token += kPanel) {
        const int64_t count = smaller<int64_t>(kPanel, a.tokens - token);
        transpose_words(scratch.grad_q + token * padded, padded, count, a.head_dim, blocks, kPanel);
        put(blocks, projected.q, sequence, head, head, token, count, grad_q, a.tokens, blocks + a.head_dim * kPanel);
      }
    }
    for (int64_t token = 0; token < a.keys; token += kPanel) {
      const int64_t count = smaller<int64_t>(kPanel, a.keys - token);
      put(scratch.grad_k + token * a.head_dim, projected.k, sequence, kv_head, a.heads + kv_head, token, count, grad_k,
          a.keys, blocks);
      grad_v.panels.put(scratch.grad_v + token * a.head_dim, a.head_dim, grad_v.feature + kv_head * a.head_dim,
                        sequence * a.keys + token, count);
    }
  }

  // A block of the gradient in a positioned head to panels of tokens.
  void put(float* block, const AllHeads<WordT>& from, int64_t sequence, int64_t head, int64_t sum, int64_t token,
           int64_t count, const HeadGradients<W>& to, int64_t tokens, float* scratch) const {
    const int64_t head_dim = call.a.head_dim;
    for (int64_t i = 0; i < head_dim * kPanel; i += kLanes) store(block + i, load(block + i) * call.a.scale);
    if (call.positions) {
      load_block(from(sequence, head), token, count, scratch);
      float* sums = scale_sums == nullptr ? nullptr
                                          : scale_sums + (sequence * (call.a.heads + call.a.kv_heads) + sum) * head_dim;
      call.positions.backward(block, scratch, head, head_dim, token, count, sums);
    }
    to.panels.put(block, head_dim, to.feature + head * head_dim, sequence * tokens + token, count);
  }
};

}  // namespace macaron_ops::MACARON_OPS_ISA

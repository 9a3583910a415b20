// The attention step in parts that its forward and backward passes share. They work on some of a call's sequences, in
// panels of their own; only what the heads attended to is saved in panels of all sequences.
#pragma once

#include "attention_forward.h"
#include "positions.h"
#include "products.h"
#include "residual.h"

namespace macaron_ops::MACARON_OPS_ISA {

constexpr Norm kNoNorm{NormKind::none, 0.f, nullptr, nullptr};
constexpr int64_t kUnitTokens = 128;     // with which a last panel that is not full costs little
constexpr int64_t kSharedTokens = 1024;  // that threads work on together: their heads stay in the last cache

// Some sequences of a call.
struct Sequences {
  int64_t first, count;
};

// What is the same for all sequences of a call.
template <class X, class W>
struct AttendCall {
  using WordT = Word<W>;
  const AttendStep<X, W>& a;
  HeadPanels q, kv;
  Buffer<int32_t> first, last;  // of the sequence that a token belongs to, where sequences are packed
  Attention<X> attention;
  Positions positions;

  AttendCall(const AttendStep<X, W>& a, const Host& host)
      : a(a),
        q(a.tokens, a.head_dim, kElements<WordT>),
        kv(a.keys, a.head_dim, kElements<WordT>),
        first(host, a.borders == nullptr ? 0 : a.tokens),
        last(host, a.borders == nullptr ? 0 : a.tokens),
        attention{{a.heads, a.tokens, a.keys, a.causal, first, last, a.masks}, Drop(a.attention_dropout), a.scale},
        positions(host, a.cos, a.sin, a.tokens, a.rotated, a.qk_scale, a.qk_scale_per_head ? a.head_dim : 0) {
    if (a.borders == nullptr) return;
    for (int64_t s = 0; s < a.sequences; ++s)
      for (int64_t t = a.borders[s]; t < a.borders[s + 1]; ++t) first[t] = a.borders[s], last[t] = a.borders[s + 1];
  }

  int64_t channels() const { return a.heads * a.head_dim; }
  int64_t kv_channels() const { return a.kv_heads * a.head_dim; }
  // The tokens of x, or of the context.
  Tokens tokens(const Sequences& s, bool of_context) const {
    const int64_t each = of_context ? a.keys : a.tokens;
    return {s.count * each, a.batch * each};
  }
  Norm norm_before() const { return a.residual.pre ? a.norm : kNoNorm; }
  // Sequences whose tokens, and those of their contexts, fill whole panels, or nearly: a power of two.
  int64_t unit() const {
    int64_t n = 1;
    while (n * a.tokens < kUnitTokens && (n * a.tokens % kPanel != 0 || (a.context != nullptr && n * a.keys % kPanel != 0)))
      n *= 2;
    return n;
  }
};

// Where their first token stands in panels of all sequences.
struct Place {
  int64_t panel, lane;

  Place(const Sequences& s, int64_t tokens) : panel(s.first * tokens / kPanel), lane(s.first * tokens % kPanel) {}
};

// Their heads.
template <class WordT>
struct Projected {
  AllHeads<WordT> q, k, v;
};

// The heads of some sequences as they were projected, where they were saved or in buffers, and with their positions.
template <class X, class W>
struct ProjectedHeads {
  using WordT = Word<W>;
  bool saved;
  int64_t q_words, kv_words;
  Buffer<WordT> own_q, own_k, own_v, positioned_q, positioned_k;
  Projected<WordT> projected, heads;

  ProjectedHeads(const Host& host, const AttendCall<X, W>& call, const Sequences& s)
      : saved(call.a.saved_q != nullptr),
        q_words(s.count * call.a.heads * call.q.words() + kSlack),
        kv_words(s.count * call.a.kv_heads * call.kv.words() + kSlack),
        own_q(host, saved ? 0 : q_words),
        own_k(host, saved ? 0 : kv_words),
        own_v(host, saved ? 0 : kv_words),
        positioned_q(host, call.positions ? q_words : 0),
        positioned_k(host, call.positions ? kv_words : 0),
        projected{of(call.a.saved_q, s, own_q, call.a.heads, call.q, false),
                  of(call.a.saved_k, s, own_k, call.a.kv_heads, call.kv, false),
                  of(call.a.saved_v, s, own_v, call.a.kv_heads, call.kv, true)},
        heads(projected) {
    if (!call.positions) return;
    heads.q.words = positioned_q;
    heads.k.words = positioned_k;
  }

  void position(const Host& host, const AttendCall<X, W>& call, const Sequences& s) const {
    if (!call.positions) return;
    position_heads(host, call.positions, projected.q, s.count, heads.q);
    position_heads(host, call.positions, projected.k, s.count, heads.k);
  }

 private:
  static AllHeads<WordT> of(void* whole_call, const Sequences& s, WordT* own, int64_t heads, const HeadPanels& at,
                            bool by_token) {
    WordT* words = static_cast<WordT*>(whole_call);
    return {words == nullptr ? own : words + s.first * heads * at.words(), heads, at, by_token};
  }
};

// Projections of N(x), or of the context, to heads. Columns of it, too, where these are not null.
template <class W, class T>
static void project_rows(const Host& host, const T* x, const Tokens& all, int64_t width, const Norm& norm,
                         const ToHeads<W>* parts, int num_parts, Word<W>* columns) {
  if (all.rows == 0) return;
  const int64_t size = words_of<Word<W>>(width) * kPanel;
  const Buffer<Word<W>> words(host, num_parts == 0 ? 0 : all.panels() * size);
  parallel(host, all.panels(), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      normalize_to_panel(x + p * kPanel * width, all.count(p), width, norm, num_parts == 0 ? nullptr : words + p * size,
                         columns, p * kPanel, all.panels() * kPanel);
  });
  if (num_parts > 0) project(host, all, parts, num_parts, width, static_cast<const Word<W>*>(words), size);
}

// Where columns of N(x) and of the context go, for the gradients of parameters; null: not wanted.
template <class W>
struct SourceColumns {
  Word<W>*x, *context;
};

template <class X, class W>
static void project_sequences(const Host& host, const AttendCall<X, W>& call, const Sequences& s, const Projected<Word<W>>* to,
                              const SourceColumns<W>& columns) {
  const AttendStep<X, W>& a = call.a;
  ToHeads<W> parts[3] = {};
  if (to != nullptr) {
    parts[0] = {{a.w_q, a.width, 1}, call.channels(), a.b_q, to->q};
    parts[1] = {{a.w_k, a.source_width, 1}, call.kv_channels(), a.b_k, to->k};
    parts[2] = {{a.w_v, a.source_width, 1}, call.kv_channels(), a.b_v, to->v};
  }
  const bool self = a.context == nullptr;
  if (to != nullptr || columns.x != nullptr)
    project_rows(host, a.x + s.first * a.tokens * a.width, call.tokens(s, false), a.width, call.norm_before(), parts,
                 to == nullptr ? 0 : self ? 3 : 1, columns.x);
  if (!self && (to != nullptr || columns.context != nullptr))
    project_rows(host, a.context + s.first * a.keys * a.source_width, call.tokens(s, true), a.source_width, kNoNorm,
                 parts + 1, to == nullptr ? 0 : 2, columns.context);
}

// The sum of the residual from what the heads attended to, as words in panels of the sequences' tokens; null: not wanted.
template <class X, class W>
static void finish(const Host& host, const AttendCall<X, W>& call, const Sequences& s, const Word<W>* attended, X* y,
                   X* total) {
  const AttendStep<X, W>& a = call.a;
  const Tokens all = call.tokens(s, false);
  const int64_t first_row = s.first * a.tokens, channels = call.channels();
  const Buffer<float> u(host, all.panels() * a.width * kPanel);
  product<W>(host, all, {a.w_out, channels, 1}, a.width, channels, attended, words_of<Word<W>>(channels) * kPanel, u, false);
  parallel(host, all.panels(), [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch(host, a.residual.pre ? 0 : kPanel * a.width);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t at = p * kPanel * a.width;
      residual_forward(u + at, a.b_out, first_row + p * kPanel, all.count(p), a.width, a.residual, a.norm,
                       a.x + first_row * a.width + at, y == nullptr ? nullptr : y + at,
                       total == nullptr ? nullptr : total + at, static_cast<float*>(scratch));
    }
  });
}

}  // namespace macaron_ops::MACARON_OPS_ISA

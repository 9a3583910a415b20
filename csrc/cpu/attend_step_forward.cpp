// The attention step, forward: macaron_ops/reference/attend_step.py.
//
// Products to heads, attention head by head and block of queries by block, product back and residual. Threads take whole
// sequences, so that heads stay in their caches, where there are enough of them, else parts of each of the three.
#include "attend_parts.h"

namespace macaron_ops::MACARON_OPS_ISA {
namespace {

// The heads' outputs, in panels of the sequences' tokens.
template <class X, class W>
void attend(const Host& host, const AttendCall<X, W>& call, const Sequences& s, const Projected<Word<W>>& heads,
            const TokenPanels<Word<W>, W>& out) {
  const AttendStep<X, W>& a = call.a;
  const int64_t blocks = call.q.blocks(), group = a.heads / a.kv_heads;
  parallel(host, s.count * a.heads * blocks, [&](int64_t begin, int64_t end) {
    const Buffer<float> block(host, a.head_dim * kPanel + kLanes);
    BlockScratch scratch;
    const TileRegisters<Word<W>> registers;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / blocks / a.heads, head = i / blocks % a.heads, query = i % blocks * kPanel;
      const Range q{query, smaller(query + kPanel, a.tokens)};
      float* statistics = a.saved_statistics;
      if (statistics != nullptr) statistics += ((s.first + sequence) * a.heads + head) * 2 * a.tokens;
      attend_block(call.attention, s.first + sequence, head, q, heads.q(sequence, head), heads.k(sequence, head / group),
                   heads.v(sequence, head / group), scratch, static_cast<float*>(block), statistics);
      out.put(block, a.head_dim, head * a.head_dim, sequence * a.tokens + query, q.end - q.begin);
    }
  });
}

template <class X, class W>
void forward_sequences(const Host& host, const AttendCall<X, W>& call, const Sequences& s) {
  using WordT = Word<W>;
  const AttendStep<X, W>& a = call.a;
  const int64_t rows = s.count * a.tokens, panels = ceil_div(rows, kPanel), channels = call.channels();
  const ProjectedHeads<X, W> own(host, call, s);
  project_sequences(host, call, s, &own.projected, {});
  own.position(host, call, s);

  const Place place(s, a.tokens);
  W* saved = a.saved_attended == nullptr ? nullptr : a.saved_attended + place.panel * channels * kPanel;
  // What is saved serves as words where these are elements and no other sequences share the panels.
  const bool alone = place.lane == 0 && (rows % kPanel == 0 || s.first + s.count == a.batch);
  const bool in_place = sizeof(WordT) == sizeof(W) && saved != nullptr && alone;
  const Buffer<WordT> own_words(host, in_place ? 0 : panels * words_of<WordT>(channels) * kPanel);
  WordT* words = own_words;
  W* elements = saved;
  if constexpr (sizeof(WordT) == sizeof(W))
    if (in_place) words = saved, elements = nullptr;
  attend(host, call, s, own.heads, TokenPanels<WordT, W>{words, elements, channels, place.lane});

  const int64_t at = s.first * a.tokens * a.width;
  finish(host, call, s, words, a.y + at, a.saved_total == nullptr ? nullptr : a.saved_total + at);
}

}  // namespace

template <class X, class W>
void attend_step_forward(const AttendStep<X, W>& a, const Host& host) {
  if (a.batch * a.tokens == 0) return;
  const AttendCall<X, W> call(a, host);
  const int64_t rows = a.batch * a.tokens, panel = call.channels() * kPanel;
  if (a.saved_attended != nullptr && rows % kPanel != 0)  // lanes beyond the last token are read, and must be numbers
    for (int64_t i = 0; i < panel; i += kLanes) store(a.saved_attended + rows / kPanel * panel + i, Vec{});
  const int64_t unit = call.unit(), units = ceil_div(a.batch, unit);
  if (units % host.threads == 0 || units >= 4 * host.threads) {
    Host alone = host;
    alone.threads = 1;
    return parallel(host, units, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u)
        forward_sequences(alone, call, {u * unit, smaller(unit, a.batch - u * unit)});
    });
  }
  const int64_t most = larger<int64_t>(kSharedTokens / a.tokens / unit, 1) * unit;
  for (int64_t first = 0; first < a.batch; first += most)
    forward_sequences(host, call, {first, smaller(most, a.batch - first)});
}

#define MACARON_INSTANTIATE(X, W) template void attend_step_forward(const AttendStep<X, W>&, const Host&);
MACARON_INSTANTIATE(float, float)
MACARON_INSTANTIATE(bf16, bf16)
MACARON_INSTANTIATE(float, bf16)
#undef MACARON_INSTANTIATE

}  // namespace macaron_ops::MACARON_OPS_ISA

// The attention step, backward: macaron_ops/reference/attend_step.py.
//
// Some sequences at a time: the gradient of the residual's sum; through w_out to the heads; attention, which gives the
// gradients of q, k and v as panels of tokens; back through the projections to x. Then these sequences' share of the
// gradients of the parameter matrices, whose rows the threads divide.
#include "attend_parts.h"
#include "attention_backward.h"
#include "parameter_gradients.h"

namespace macaron_ops::MACARON_OPS_ISA {
namespace {

constexpr int64_t kGroupTokens = 512;  // whose gradients exist at a time

template <class X, class W>
bool needs_attention(const AttendStep<X, W>& a) {
  const bool norm = a.residual.pre && (a.grad_norm_weight || a.grad_norm_bias);
  return a.grad_x || norm || a.grad_context || a.grad_w_q || a.grad_w_k || a.grad_w_v || a.grad_b_q || a.grad_b_k ||
         a.grad_b_v || a.grad_pairs_bias || a.grad_keys_bias || a.grad_qk_scale;
}

// What the sequences of a group hand on to the gradients of parameters.
template <class X, class W>
struct Group {
  using WordT = Word<W>;
  using Element = Packed<W>;
  const AttendCall<X, W>& call;
  Sequences sequences;
  int64_t panels, context_panels;          // of its tokens and of its contexts' tokens
  Buffer<WordT> n, u, context;             // columns of N(x), of the gradient in u, of the context
  Buffer<Element> q, k, v;                 // gradients, [panel][channel][kPanel]
  Buffer<Element> attended;                // where elements are wider than what was saved
  Buffer<float> partial;                   // [panel][3][width]: sums for b_out, norm_weight, norm_bias

  Group(const Host& host, const AttendCall<X, W>& call, int64_t count)
      : call(call),
        sequences{0, count},
        panels(ceil_div(count * call.a.tokens, kPanel)),
        context_panels(call.a.context == nullptr ? 0 : ceil_div(count * call.a.keys, kPanel)),
        n(host, of_x() ? columns(call.a.width, panels) : 0),
        u(host, call.a.grad_w_out == nullptr ? 0 : columns(call.a.width, panels)),
        context(host, of_source() && context_panels > 0 ? columns(call.a.source_width, context_panels) : 0),
        q(host, panels * call.channels() * kPanel),
        k(host, source_panels() * call.kv_channels() * kPanel),
        v(host, source_panels() * call.kv_channels() * kPanel),
        attended(host, sizeof(Element) == sizeof(W) ? 0 : panels * call.channels() * kPanel),
        partial(host, panels * 3 * call.a.width) {}

  bool of_source() const { return call.a.grad_w_k != nullptr || call.a.grad_w_v != nullptr; }
  bool of_x() const { return call.a.grad_w_q != nullptr || (context_panels == 0 && of_source()); }
  int64_t source_panels() const { return call.a.context == nullptr ? panels : context_panels; }
  static int64_t columns(int64_t width, int64_t panels) {
    return round_up(width, kPanel) * panels * kPanel / kElements<WordT>;
  }
  RowSums sums(int64_t p) const {
    float* at = partial + p * 3 * call.a.width;
    return {at, at + call.a.width, at + 2 * call.a.width};
  }
};

// -- attention -------------------------------------------------------------------------------------------------------

template <class X, class W>
class AttentionBackward {
  using WordT = Word<W>;
  using Element = Packed<W>;

 public:
  const AttendCall<X, W>& call;
  const Sequences& s;
  const Projected<WordT>&projected, &heads;  // before and after their positions
  const AllHeads<WordT>& grad;               // of the heads' outputs
  TokenPanels<WordT, Element> grad_q, grad_k, grad_v;
  float* scale_sums;  // of qk_scale's gradient: [sequence][heads + kv_heads][head_dim], null: not needed

  void run(const Host& host) const {
    // A learned mask that sequences or heads share is added to by one thread.
    const AttendStep<X, W>& a = call.a;
    const bool sequences_share = a.grad_pairs_bias != nullptr && a.grad_strides[0] == 0;
    const bool heads_share = a.grad_keys_bias != nullptr || (a.grad_pairs_bias != nullptr && a.grad_strides[1] == 0);
    const int64_t per_sequence = heads_share ? a.kv_heads : 1, per_head = sequences_share ? s.count : 1;
    parallel(host, s.count / per_head * (a.kv_heads / per_sequence), [&](int64_t begin, int64_t end) {
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
        dots(g, static_cast<const W*>(a.saved_attended) + s.first * a.tokens / kPanel * call.channels() * kPanel,
             call.channels(), head * a.head_dim, sequence * a.tokens, static_cast<float*>(scratch.delta));
      attend_backward(call.attention, batch, head, heads.q(sequence, head), k, v, g,
                      a.saved_statistics + (batch * a.heads + head) * 2 * a.tokens, masks, scratch);
      for (int64_t token = 0; token < a.tokens; token += kPanel) {
        const int64_t count = smaller<int64_t>(kPanel, a.tokens - token);
        transpose_words(scratch.grad_q + token * padded, padded, count, a.head_dim, blocks, kPanel);
        put(blocks, projected.q, sequence, head, head, token, count, grad_q, a.tokens, a.scale, blocks + a.head_dim * kPanel);
      }
    }
    for (int64_t token = 0; token < a.keys; token += kPanel) {
      const int64_t count = smaller<int64_t>(kPanel, a.keys - token);
      put(scratch.grad_k + token * a.head_dim, projected.k, sequence, kv_head, a.heads + kv_head, token, count, grad_k,
          a.keys, a.scale, blocks);
      grad_v.put(scratch.grad_v + token * a.head_dim, a.head_dim, kv_head * a.head_dim, sequence * a.keys + token, count);
    }
  }

  // A block of the gradient in a positioned head to panels of tokens.
  void put(float* block, const AllHeads<WordT>& from, int64_t sequence, int64_t head, int64_t sum, int64_t token,
           int64_t count, const TokenPanels<WordT, Element>& to, int64_t tokens, float scale, float* scratch) const {
    const int64_t head_dim = call.a.head_dim;
    for (int64_t i = 0; i < head_dim * kPanel; i += kLanes) store(block + i, load(block + i) * scale);
    if (call.positions) {
      load_block(from(sequence, head), token, count, scratch);
      float* sums = scale_sums == nullptr ? nullptr
                                          : scale_sums + (sequence * (call.a.heads + call.a.kv_heads) + sum) * head_dim;
      call.positions.backward(block, scratch, head, head_dim, token, count, sums);
    }
    to.put(block, head_dim, head * head_dim, sequence * tokens + token, count);
  }
};

// Zeros in the lanes beyond the last token of the last panel: gradients of parameters are sums over all lanes.
template <class Element>
void clear_last_panel(Element* panels, int64_t features, int64_t tokens) {
  if (tokens % kPanel == 0) return;
  Element* last = panels + tokens / kPanel * features * kPanel;
  for (int64_t i = 0; i < features * kPanel; i += kLanes) store(last + i, Vec{});
}

// -- some sequences --------------------------------------------------------------------------------------------------

// The gradient of the residual's sum, and the words and columns of that of u.
template <class X, class W>
void residual_of(const Host& host, const Group<X, W>& group, float* grad_total, Word<W>* grad_u) {
  const AttendCall<X, W>& call = group.call;
  const Sequences& s = group.sequences;
  const AttendStep<X, W>& a = call.a;
  const int64_t rows = s.count * a.tokens, first_row = s.first * a.tokens, panels = ceil_div(rows, kPanel);
  const int64_t size = words_of<Word<W>>(a.width) * kPanel;
  const Tokens tokens{rows};
  const bool lacks_total = !a.residual.pre && a.saved_total == nullptr;
  const Buffer<X> own_total(host, lacks_total ? rows * a.width : 0);
  const X* total = a.saved_total == nullptr ? nullptr : a.saved_total + first_row * a.width;
  if (lacks_total) {
    const W* attended = a.saved_attended + first_row / kPanel * call.channels() * kPanel;
    total = own_total;
    if constexpr (sizeof(W) == sizeof(Word<W>)) {
      finish<X, W>(host, call, s, attended, nullptr, own_total);
    } else {
      const int64_t word_rows = words_of<Word<W>>(call.channels());
      const Buffer<Word<W>> words(host, panels * word_rows * kPanel);
      parallel(host, panels, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * word_rows; i < end * word_rows; ++i) {
          const W* from = attended + (i / word_rows * call.channels() + i % word_rows * kElements<Word<W>>) * kPanel;
          const bool second = (i % word_rows + 1) * kElements<Word<W>> <= call.channels();
          for (int64_t l = 0; l < kPanel; l += kLanes)
            store_words(words + i * kPanel + l, load(from + l), second && kElements<Word<W>> > 1 ? load(from + kPanel + l) : Vec{});
        }
      });
      finish<X, W>(host, call, s, words, nullptr, own_total);
    }
  }
  parallel(host, panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      residual_backward(a.grad + (first_row + p * kPanel) * a.width, first_row + p * kPanel, tokens.count(p), a.width,
                        a.residual, a.norm, total == nullptr ? nullptr : total + p * kPanel * a.width,
                        grad_total + p * kPanel * a.width, grad_u + p * size, static_cast<Word<W>*>(group.u),
                        p * kPanel, panels * kPanel, group.sums(p));
  });
}

template <class X, class W>
void backward_sequences(const Host& host, const Group<X, W>& group, float* scale_sums) {
  using WordT = Word<W>;
  using Element = Packed<W>;
  const AttendCall<X, W>& call = group.call;
  const Sequences& s = group.sequences;
  const AttendStep<X, W>& a = call.a;
  const bool self = a.context == nullptr;
  const Tokens all{s.count * a.tokens}, all_source{s.count * a.keys};  // without a context the same
  const int64_t first_row = s.first * a.tokens, panels = all.panels(), source_panels = all_source.panels();
  const int64_t channels = call.channels(), kv_channels = call.kv_channels();

  const Buffer<float> grad_total(host, panels * kPanel * a.width);
  const int64_t u_size = words_of<WordT>(a.width) * kPanel;
  const Buffer<WordT> grad_u(host, panels * u_size);
  residual_of<X, W>(host, group, grad_total, grad_u);

  if constexpr (sizeof(Element) != sizeof(W)) {
    const W* attended = a.saved_attended + first_row / kPanel * channels * kPanel;
    for (int64_t i = 0; i < panels * channels * kPanel; i += kLanes)
      store(group.attended + i, load(attended + i));
  }
  if (!needs_attention(a)) return;

  // Projections as the forward pass had them, and the gradient in the heads' outputs.
  const int64_t q_words = s.count * a.heads * call.q.words() + kSlack, kv_words = s.count * a.kv_heads * call.kv.words() + kSlack;
  const bool saved = a.saved_q != nullptr;
  const Buffer<WordT> own_q(host, saved ? 0 : q_words), own_k(host, saved ? 0 : kv_words), own_v(host, saved ? 0 : kv_words);
  const Projected<WordT> projected{heads_of<WordT>(a.saved_q, s, own_q, a.heads, call.q, false),
                                   heads_of<WordT>(a.saved_k, s, own_k, a.kv_heads, call.kv, false),
                                   heads_of<WordT>(a.saved_v, s, own_v, a.kv_heads, call.kv, true)};
  project_sequences(host, call, s, saved ? nullptr : &projected, {group.n, group.context});
  Projected<WordT> heads = projected;
  const Buffer<WordT> positioned_q(host, call.positions ? q_words : 0), positioned_k(host, call.positions ? kv_words : 0);
  if (call.positions) {
    heads.q.words = positioned_q;
    heads.k.words = positioned_k;
    position_heads(host, call.positions, projected.q, s.count, heads.q);
    position_heads(host, call.positions, projected.k, s.count, heads.k);
  }
  const Buffer<WordT> grad_words(host, q_words);
  const AllHeads<WordT> grad_heads{grad_words, a.heads, call.q, false};
  const ToHeads<W> to_heads{{a.w_out, 1, channels}, channels, nullptr, grad_heads};
  project(host, all, &to_heads, 1, a.width, static_cast<const WordT*>(grad_u), u_size);

  // Gradients in q, k and v.
  constexpr bool words_apart = sizeof(Element) != sizeof(WordT);
  Element* const elements[3] = {group.q, group.k, group.v};
  const int64_t q_size = words_of<WordT>(channels) * kPanel, kv_size = words_of<WordT>(kv_channels) * kPanel;
  const Buffer<WordT> words_q(host, words_apart ? panels * q_size : 0), words_k(host, words_apart ? source_panels * kv_size : 0),
      words_v(host, words_apart ? source_panels * kv_size : 0);
  WordT* words[3] = {words_q, words_k, words_v};
  clear_last_panel(elements[0], channels, all.rows);
  clear_last_panel(elements[1], kv_channels, all_source.rows);
  clear_last_panel(elements[2], kv_channels, all_source.rows);
  AttentionBackward<X, W>{call, s, projected, heads, grad_heads, {words[0], elements[0], channels},
                          {words[1], elements[1], kv_channels}, {words[2], elements[2], kv_channels}, scale_sums}
      .run(host);
  if constexpr (!words_apart)
    for (int i = 0; i < 3; ++i) words[i] = elements[i];

  // Back to x and the context.
  auto add_source = [&](float* grad, bool accumulate) {
    product<W>(host, all_source, {a.w_k, 1, a.source_width}, a.source_width, kv_channels, words[1], kv_size, grad, accumulate);
    product<W>(host, all_source, {a.w_v, 1, a.source_width}, a.source_width, kv_channels, words[2], kv_size, grad, true);
  };
  const bool norm = a.residual.pre && (a.grad_norm_weight != nullptr || a.grad_norm_bias != nullptr);
  if (a.grad_x != nullptr || norm) {
    const Buffer<float> grad_n(host, panels * a.width * kPanel);
    product<W>(host, all, {a.w_q, 1, a.width}, a.width, channels, words[0], q_size, grad_n, false);
    if (self) add_source(grad_n, true);
    parallel(host, panels, [&](int64_t begin, int64_t end) {
      const Buffer<float> scratch(host, kPanel * a.width);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t row = first_row + p * kPanel;
        input_backward(grad_n + p * a.width * kPanel, a.grad + row * a.width, grad_total + p * kPanel * a.width,
                       all.count(p), a.width, a.residual, a.norm, a.x + row * a.width, a.grad_x == nullptr ? nullptr : a.grad_x + row * a.width,
                       static_cast<float*>(scratch), group.sums(p));
      }
    });
  }
  if (a.grad_context == nullptr) return;
  const Buffer<float> grad(host, source_panels * a.source_width * kPanel);
  add_source(grad, false);
  parallel(host, source_panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      W* to = a.grad_context + (s.first * a.keys + p * kPanel) * a.source_width;
      panel_to_rows(grad + p * a.source_width * kPanel, all_source.count(p), a.source_width,
                    [&](int64_t i, int64_t c, Vec v, int64_t n) { store_part(to + i * a.source_width + c, v, n); });
    }
  });
}

// -- gradients of parameters -----------------------------------------------------------------------------------------

template <class X, class W>
void clear(const AttendStep<X, W>& a) {
  auto zero = [](auto* p, int64_t count) {
    if (p != nullptr) std::memset(static_cast<void*>(p), 0, size_t(count) * sizeof *p);
  };
  const int64_t channels = a.heads * a.head_dim, kv_channels = a.kv_heads * a.head_dim;
  zero(a.grad_w_q, channels * a.width);
  zero(a.grad_w_k, kv_channels * a.source_width);
  zero(a.grad_w_v, kv_channels * a.source_width);
  zero(a.grad_w_out, channels * a.width);
  zero(a.grad_b_q, channels);
  zero(a.grad_b_k, kv_channels);
  zero(a.grad_b_v, kv_channels);
  zero(a.grad_b_out, a.width);
  zero(a.grad_norm_weight, a.width);
  zero(a.grad_norm_bias, a.width);
  zero(a.grad_context, a.batch * a.keys * a.source_width);
}

}  // namespace

template <class X, class W>
void attend_step_backward(const AttendStep<X, W>& a, const Host& host) {
  using Element = Packed<W>;
  const AttendCall<X, W> call(a, host);
  const int64_t channels = call.channels(), kv_channels = call.kv_channels();
  const int64_t scales = a.qk_scale_per_head ? a.heads * a.head_dim : a.head_dim;
  int64_t pairs = 1;
  const int64_t shape[4] = {a.batch, a.heads, a.tokens, a.keys};
  for (int i = 0; i < 4; ++i) pairs *= a.grad_strides[i] == 0 ? 1 : shape[i];
  if (a.grad_pairs_bias != nullptr) std::memset(a.grad_pairs_bias, 0, size_t(pairs) * sizeof(float));
  if (a.grad_keys_bias != nullptr) std::memset(a.grad_keys_bias, 0, size_t(a.batch * a.keys) * sizeof(float));
  if (a.grad_qk_scale != nullptr) std::memset(a.grad_qk_scale, 0, size_t(scales) * sizeof(float));
  if (a.batch * a.tokens * a.keys == 0) clear(a);  // what has nothing to sum
  if (a.batch * a.tokens == 0) return;

  const int64_t unit = call.unit();
  const int64_t most = smaller(larger<int64_t>(kGroupTokens / a.tokens / unit, 1) * unit, a.batch);
  Group<X, W> group(host, call, most);
  const bool several = most < a.batch;
  MatrixGradient<W> w_q(host, a.grad_w_q, channels, a.width, false, several);
  MatrixGradient<W> w_k(host, a.grad_w_k, kv_channels, a.source_width, false, several);
  MatrixGradient<W> w_v(host, a.grad_w_v, kv_channels, a.source_width, false, several);
  MatrixGradient<W> w_out(host, a.grad_w_out, channels, a.width, true, several);
  const int64_t scale_rows = a.heads + a.kv_heads;
  const Buffer<float> scale_sums(host, a.grad_qk_scale == nullptr ? 0 : most * scale_rows * a.head_dim);

  for (int64_t first = 0; first < a.batch; first += most) {
    group.sequences = {first, smaller(most, a.batch - first)};
    const int64_t count = group.sequences.count;
    group.panels = ceil_div(count * a.tokens, kPanel);
    if (a.context != nullptr) group.context_panels = ceil_div(count * a.keys, kPanel);
    for (int64_t i = 0; i < group.panels * 3 * a.width; ++i) group.partial[i] = 0.f;
    if (scale_sums != nullptr) std::memset(scale_sums, 0, size_t(count * scale_rows * a.head_dim) * sizeof(float));

    backward_sequences<X, W>(host, group, scale_sums);

    const bool later = first > 0, last = first + most >= a.batch, self = a.context == nullptr;
    const int64_t source_panels = group.source_panels();
    const Word<W>* source = self ? group.n : group.context;
    auto add = [&](MatrixGradient<W>& to, const Element* grad, int64_t panels, const Word<W>* inputs) {
      if (to) to.add(host, grad, panels, inputs, !later, last);
    };
    add(w_q, group.q, group.panels, group.n);
    if (source_panels > 0) {
      add(w_k, group.k, source_panels, source);
      add(w_v, group.v, source_panels, source);
    }
    if (a.grad_b_q != nullptr) add_rows<Element>(host, group.q, channels, group.panels, a.grad_b_q, later);
    if (a.grad_b_k != nullptr) add_rows<Element>(host, group.k, kv_channels, source_panels, a.grad_b_k, later);
    if (a.grad_b_v != nullptr) add_rows<Element>(host, group.v, kv_channels, source_panels, a.grad_b_v, later);
    if (a.grad_w_out != nullptr) {
      const Element* attended = group.attended;
      if constexpr (sizeof(Element) == sizeof(W)) attended = a.saved_attended + first * a.tokens / kPanel * channels * kPanel;
      add(w_out, attended, group.panels, group.u);
    }
    float* const vectors[3] = {a.grad_b_out, a.grad_norm_weight, a.grad_norm_bias};
    for (int i = 0; i < 3; ++i)
      if (vectors[i] != nullptr)
        add_partial(group.partial + i * a.width, group.panels, 3 * a.width, a.width, vectors[i], later);
    if (a.grad_qk_scale != nullptr)
      for (int64_t row = 0; row < count * scale_rows; ++row) {
        const int64_t head = row % scale_rows % a.heads;
        float* to = a.grad_qk_scale + (a.qk_scale_per_head ? head * a.head_dim : 0);
        for (int64_t c = 0; c < a.head_dim; ++c) to[c] += scale_sums[row * a.head_dim + c];
      }
  }
}

#define MACARON_INSTANTIATE(X, W) template void attend_step_backward(const AttendStep<X, W>&, const Host&);
MACARON_INSTANTIATE(float, float)
MACARON_INSTANTIATE(bf16, bf16)
MACARON_INSTANTIATE(float, bf16)
#undef MACARON_INSTANTIATE

}  // namespace macaron_ops::MACARON_OPS_ISA

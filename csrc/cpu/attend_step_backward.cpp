// The attention step, backward: macaron_ops/reference/attend_step.py.
//
// Some sequences at a time: the gradient of the residual's sum; through w_out to the heads; attention, which gives the
// gradients of q, k and v as panels of tokens; back through the projections to x. Then these sequences' share of the
// gradients of the parameter matrices, whose rows the threads divide.
#include "attend_attention.h"
#include "parameter_gradients.h"

namespace macaron_ops::MACARON_OPS_ISA {
namespace {

constexpr int64_t kGroupTokens = 512, kLeanGroupTokens = 128;  // whose gradients exist at a time

template <class X, class W>
bool needs_attention(const AttendStep<X, W>& a) {
  const bool norm = a.residual.pre && (a.grad_norm_weight || a.grad_norm_bias);
  return a.grad_x || norm || a.grad_context || a.grad_w_q || a.grad_w_k || a.grad_w_v || a.grad_b_q || a.grad_b_k ||
         a.grad_b_v || a.grad_pairs_bias || a.grad_keys_bias || a.grad_qk_scale;
}

// -- the projections' parameters -------------------------------------------------------------------------------------

// One product of the projections: q, k and v together where their parameters are one tensor, else each by itself.
template <class W>
struct Part {
  const W* w;  // (features, width)
  int64_t features, width;
  bool of_context;
  W* grad_w;
  float* grad_b;
};

template <class X, class W>
struct Parts {
  Part<W> part[3];
  int count;
  int of[3];           // q, k, v: their part
  int64_t feature[3];  // and where they begin in it

  explicit Parts(const AttendStep<X, W>& a) {
    const int64_t rows = a.heads * a.head_dim, kv_rows = a.kv_heads * a.head_dim;
    const bool cross = a.context != nullptr;
    part[0] = {a.w_q, rows, a.width, false, a.grad_w_q, a.grad_b_q};
    part[1] = {a.w_k, kv_rows, a.source_width, cross, a.grad_w_k, a.grad_b_k};
    part[2] = {a.w_v, kv_rows, a.source_width, cross, a.grad_w_v, a.grad_b_v};
    count = 3;
    for (int i = 0; i < 3; ++i) of[i] = i, feature[i] = 0;
    if (!a.packed) return;
    const int into = cross ? 1 : 0;  // k and v, or v alone, join it
    feature[1] = cross ? 0 : rows;
    feature[2] = feature[1] + kv_rows;
    of[1] = of[2] = into;
    part[into].features = feature[2] + kv_rows;
    count = into + 1;
  }
};

// What the sequences of a group hand on to the gradients of parameters.
template <class X, class W>
struct Group {
  using WordT = Word<W>;
  using Element = Packed<W>;
  const AttendCall<X, W>& call;
  Parts<X, W> parts;
  Sequences sequences;
  Buffer<WordT> n, u, context;       // columns of N(x), of the gradient in u, of the context
  Buffer<Element> first, second, third;
  Element* grads[3];                 // of each part's features: [panel][feature][kPanel]
  Buffer<Element> attended;          // where what was saved is narrower than elements, or in panels with others
  Buffer<float> partial;             // [panel][3][width]: sums for b_out, norm_weight, norm_bias

  Group(const Host& host, const AttendCall<X, W>& call, const Parts<X, W>& parts, int64_t count)
      : call(call),
        parts(parts),
        sequences{0, count},
        n(host, needs_columns(false) ? columns(call.a.width, tokens(false).panels()) : 0),
        u(host, call.a.grad_w_out == nullptr ? 0 : columns(call.a.width, tokens(false).panels())),
        context(host, needs_columns(true) ? columns(call.a.source_width, tokens(true).panels()) : 0),
        first(host, size(0)),
        second(host, size(1)),
        third(host, size(2)),
        grads{first, second, third},
        attended(host, needs_attended(count) ? tokens(false).panels() * call.channels() * kPanel : 0),
        partial(host, tokens(false).panels() * 3 * call.a.width) {}

  Tokens tokens(bool of_context) const { return call.tokens(sequences, of_context); }
  Tokens tokens_of_part(int i) const { return tokens(parts.part[i].of_context); }
  RowSums sums(int64_t p) const {
    float* at = partial + p * 3 * call.a.width;
    return {at, at + call.a.width, at + 2 * call.a.width};
  }

 private:
  bool needs_attended(int64_t count) const {
    return sizeof(Element) != sizeof(W) || (count < call.a.batch && count * call.a.tokens % kPanel != 0);
  }
  bool needs_columns(bool of_context) const {
    for (int i = 0; i < parts.count; ++i)
      if (parts.part[i].grad_w != nullptr && parts.part[i].of_context == of_context) return true;
    return false;
  }
  int64_t size(int i) const {
    return i < parts.count && needs_attention(call.a) ? tokens_of_part(i).panels() * parts.part[i].features * kPanel : 0;
  }
  static int64_t columns(int64_t width, int64_t panels) {
    return round_up(width, kPanel) * panels * kPanel / kElements<WordT>;
  }
};

// -- some sequences --------------------------------------------------------------------------------------------------

// Zeros in the lanes beyond the last token of the last panel: gradients of parameters are sums over all lanes.
template <class Element>
void clear_last_panel(Element* panels, int64_t features, int64_t tokens) {
  if (tokens % kPanel == 0) return;
  Element* last = panels + tokens / kPanel * features * kPanel;
  for (int64_t i = 0; i < features * kPanel; i += kLanes) store(last + i, Vec{});
}

// What the heads attended to, as elements in panels of these sequences' tokens.
template <class X, class W>
const Packed<W>* attended_of(const Host& host, const Group<X, W>& group) {
  const int64_t channels = group.call.channels(), rows = group.tokens(false).rows, tokens = group.call.a.tokens;
  const Place place(group.sequences, tokens);
  const W* saved = group.call.a.saved_attended + place.panel * channels * kPanel;
  if constexpr (sizeof(Packed<W>) == sizeof(W))
    if (group.attended == nullptr) return saved;
  const int64_t last = ceil_div(group.call.a.batch * tokens, kPanel) - place.panel - 1;  // panel that was saved
  parallel(host, ceil_div(rows, kPanel), [&](int64_t begin, int64_t end) {
    alignas(64) float both[2 * kPanel + kLanes] = {};  // a row of two neighbours
    for (int64_t p = begin; p < end; ++p)
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t q = p; q <= smaller(p + 1, last); ++q)
          for (int64_t l = 0; l < kPanel; l += kLanes)
            store(both + (q - p) * kPanel + l, load(saved + (q * channels + c) * kPanel + l));
        for (int64_t l = 0; l < kPanel; l += kLanes)
          store(group.attended + (p * channels + c) * kPanel + l,
                first_of(load(both + place.lane + l), larger<int64_t>(rows - p * kPanel - l, 0)));
      }
  });
  return group.attended;
}

// The gradient of the residual's sum, and the words and columns of that of u.
template <class X, class W>
void residual_of(const Host& host, const Group<X, W>& group, const Packed<W>* attended, float* grad_total,
                 Word<W>* grad_u) {
  const AttendCall<X, W>& call = group.call;
  const Sequences& s = group.sequences;
  const AttendStep<X, W>& a = call.a;
  const int64_t rows = s.count * a.tokens, first_row = s.first * a.tokens, panels = ceil_div(rows, kPanel);
  const int64_t size = words_of<Word<W>>(a.width) * kPanel;
  const Tokens tokens = group.tokens(false);
  const bool lacks_total = !a.residual.pre && a.saved_total == nullptr;
  const Buffer<X> own_total(host, lacks_total ? rows * a.width : 0);
  const X* total = a.saved_total == nullptr ? nullptr : a.saved_total + first_row * a.width;
  if (lacks_total) {
    total = own_total;
    if constexpr (sizeof(Packed<W>) == sizeof(Word<W>)) {
      finish<X, W>(host, call, s, attended, nullptr, own_total);
    } else {
      const int64_t word_rows = words_of<Word<W>>(call.channels());
      const Buffer<Word<W>> words(host, panels * word_rows * kPanel);
      parallel(host, panels, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * word_rows; i < end * word_rows; ++i) {
          const Packed<W>* from = attended + (i / word_rows * call.channels() + i % word_rows * kElements<Word<W>>) * kPanel;
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

// The gradients of the projections' features, as elements into the group and as words; returns these.
template <class X, class W>
void attention_of(const Host& host, const Group<X, W>& group, const Word<W>* grad_u, Word<W>* const* words,
                  float* scale_sums) {
  using WordT = Word<W>;
  const AttendCall<X, W>& call = group.call;
  const Sequences& s = group.sequences;
  const AttendStep<X, W>& a = call.a;
  const int64_t channels = call.channels();
  const ProjectedHeads<X, W> own(host, call, s);
  project_sequences(host, call, s, own.saved ? nullptr : &own.projected, {group.n, group.context});
  own.position(host, call, s);

  const Buffer<WordT> grad_words(host, s.count * a.heads * call.q.words() + kSlack);
  const AllHeads<WordT> grad_heads{grad_words, a.heads, call.q, false};
  const ToHeads<W> to_heads{{a.w_out, 1, channels}, channels, nullptr, grad_heads};
  project(host, group.tokens(false), &to_heads, 1, a.width, grad_u, words_of<WordT>(a.width) * kPanel);

  HeadGradients<W> to[3];
  for (int i = 0; i < 3; ++i) {
    const int part = group.parts.of[i];
    to[i] = {{words[part], group.grads[part], group.parts.part[part].features}, group.parts.feature[i]};
  }
  for (int i = 0; i < group.parts.count; ++i)
    clear_last_panel(group.grads[i], group.parts.part[i].features, group.tokens_of_part(i).rows);
  AttentionBackward<X, W>{call, s, own.projected, own.heads, grad_heads, to[0], to[1], to[2], scale_sums}.run(host);
}

// The gradient in N(x), or in the context, as a panel of floats per kPanel tokens.
template <class X, class W>
void source_of(const Host& host, const Group<X, W>& group, bool of_context, const Word<W>* const* words, float* grad) {
  bool later = false;
  for (int i = 0; i < group.parts.count; ++i) {
    const Part<W>& part = group.parts.part[i];
    if (part.of_context != of_context) continue;
    product<W>(host, group.tokens(of_context), {part.w, 1, part.width}, part.width, part.features, words[i],
               words_of<Word<W>>(part.features) * kPanel, grad, later);
    later = true;
  }
}

template <class X, class W>
void backward_sequences(const Host& host, const Group<X, W>& group, const Packed<W>* attended, float* scale_sums) {
  using WordT = Word<W>;
  using Element = Packed<W>;
  const AttendCall<X, W>& call = group.call;
  const AttendStep<X, W>& a = call.a;
  const Sequences& s = group.sequences;
  const Tokens all = group.tokens(false), of_context = group.tokens(true);
  const int64_t first_row = s.first * a.tokens, panels = all.panels();

  const Buffer<float> grad_total(host, a.residual.pre ? 0 : panels * kPanel * a.width);  // pre: it is a.grad
  const Buffer<WordT> grad_u(host, panels * words_of<WordT>(a.width) * kPanel);
  residual_of<X, W>(host, group, attended, grad_total, grad_u);
  if (!needs_attention(a)) return;

  constexpr bool words_apart = sizeof(Element) != sizeof(WordT);
  auto size = [&](int i) {
    if (!words_apart || i >= group.parts.count) return int64_t(0);
    return group.tokens_of_part(i).panels() * words_of<WordT>(group.parts.part[i].features) * kPanel;
  };
  const Buffer<WordT> first(host, size(0)), second(host, size(1)), third(host, size(2));
  WordT* words[3] = {first, second, third};
  attention_of<X, W>(host, group, grad_u, words, scale_sums);
  if constexpr (!words_apart)
    for (int i = 0; i < 3; ++i) words[i] = group.grads[i];

  const bool norm = a.residual.pre && (a.grad_norm_weight != nullptr || a.grad_norm_bias != nullptr);
  if (a.grad_x != nullptr || norm) {
    const Buffer<float> grad_n(host, panels * a.width * kPanel);
    source_of<X, W>(host, group, false, words, grad_n);
    parallel(host, panels, [&](int64_t begin, int64_t end) {
      const Buffer<float> scratch(host, kPanel * a.width);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t at = p * kPanel * a.width, row = first_row * a.width + at;
        input_backward(grad_n + at, a.grad + row, grad_total + at, all.count(p), a.width, a.residual, a.norm, a.x + row,
                       a.grad_x == nullptr ? nullptr : a.grad_x + row, static_cast<float*>(scratch), group.sums(p));
      }
    });
  }
  if (a.grad_context == nullptr) return;
  const Buffer<float> grad(host, of_context.panels() * a.source_width * kPanel);
  source_of<X, W>(host, group, true, words, grad);
  parallel(host, of_context.panels(), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      W* to = a.grad_context + (s.first * a.keys + p * kPanel) * a.source_width;
      panel_to_rows(grad + p * a.source_width * kPanel, of_context.count(p), a.source_width,
                    [&](int64_t i, int64_t c, Vec v, int64_t n) { store_part(to + i * a.source_width + c, v, n); });
    }
  });
}

// -- the whole call --------------------------------------------------------------------------------------------------

template <class X, class W>
MatrixGradient<W> of_part(const Host& host, const Parts<X, W>& parts, int i, bool several) {
  const Part<W>& part = parts.part[i];
  return {host, i < parts.count ? part.grad_w : nullptr, part.features, part.width, false, several};
}

template <class T>
void clear(T* p, int64_t count) {
  if (p != nullptr) std::memset(static_cast<void*>(p), 0, size_t(count) * sizeof(T));
}

// What the kernels add to, and where there is nothing to sum everything else.
template <class X, class W>
void clear_gradients(const AttendStep<X, W>& a, const Parts<X, W>& parts) {
  int64_t pairs = 1;
  const int64_t shape[4] = {a.batch, a.heads, a.tokens, a.keys};
  for (int i = 0; i < 4; ++i) pairs *= a.grad_strides[i] == 0 ? 1 : shape[i];
  clear(a.grad_pairs_bias, pairs);
  clear(a.grad_keys_bias, a.batch * a.keys);
  clear(a.grad_qk_scale, a.qk_scale_per_head ? a.heads * a.head_dim : a.head_dim);
  if (a.batch * a.tokens * a.keys > 0) return;
  for (int i = 0; i < parts.count; ++i) {
    clear(parts.part[i].grad_w, parts.part[i].features * parts.part[i].width);
    clear(parts.part[i].grad_b, parts.part[i].features);
  }
  clear(a.grad_w_out, a.width * a.heads * a.head_dim);
  clear(a.grad_b_out, a.width);
  clear(a.grad_norm_weight, a.width);
  clear(a.grad_norm_bias, a.width);
  clear(a.grad_context, a.batch * a.keys * a.source_width);
}

// As many sequences as fit into the memory that sums over several groups would take; else a few.
template <class X, class W>
int64_t sequences_of_group(const AttendCall<X, W>& call, const Parts<X, W>& parts) {
  const AttendStep<X, W>& a = call.a;
  const int64_t unit = call.unit(), tokens = a.saved_q == nullptr ? kLeanGroupTokens : kGroupTokens;
  const int64_t few = smaller(larger<int64_t>(tokens / a.tokens / unit, 1) * unit, a.batch);
  int64_t sums = a.grad_w_out == nullptr ? 0 : MatrixGradient<W>::bytes_beside(call.channels(), a.width), features = 0;
  for (int i = 0; i < parts.count; ++i) {
    const Part<W>& part = parts.part[i];
    if (part.grad_w != nullptr) sums += MatrixGradient<W>::bytes_beside(part.features, part.width);
    features += part.features;
  }
  const int64_t heads = a.saved_q == nullptr ? 2 * features : features;  // projected again, and gradients
  const int64_t token = (heads + call.channels() + 4 * a.width) * sizeof(Packed<W>) + a.width * sizeof(float);
  return (a.batch - few) * a.tokens * token <= sums ? a.batch : few;
}

}  // namespace

template <class X, class W>
void attend_step_backward(const AttendStep<X, W>& a, const Host& host) {
  using Element = Packed<W>;
  const Parts<X, W> parts(a);
  clear_gradients(a, parts);
  if (a.batch * a.tokens == 0) return;

  const AttendCall<X, W> call(a, host);
  const int64_t channels = call.channels();
  const int64_t most = sequences_of_group(call, parts);
  Group<X, W> group(host, call, parts, most);
  const bool several = most < a.batch;
  MatrixGradient<W> grad_w[3] = {of_part(host, parts, 0, several), of_part(host, parts, 1, several),
                                 of_part(host, parts, 2, several)};
  MatrixGradient<W> grad_w_out(host, a.grad_w_out, channels, a.width, true, several);
  const int64_t scale_rows = a.heads + a.kv_heads;
  const Buffer<float> scale_sums(host, a.grad_qk_scale == nullptr ? 0 : most * scale_rows * a.head_dim);

  for (int64_t first = 0; first < a.batch; first += most) {
    group.sequences = {first, smaller(most, a.batch - first)};
    const int64_t count = group.sequences.count, panels = group.tokens(false).panels();
    const bool later = first > 0, last = first + most >= a.batch;
    clear(static_cast<float*>(group.partial), panels * 3 * a.width);
    clear(static_cast<float*>(scale_sums), count * scale_rows * a.head_dim);
    const Element* attended = attended_of<X, W>(host, group);
    backward_sequences<X, W>(host, group, attended, scale_sums);

    for (int i = 0; i < parts.count; ++i) {
      const Part<W>& part = parts.part[i];
      const Tokens tokens = group.tokens_of_part(i);
      if (tokens.rows == 0) continue;
      const Word<W>* inputs = part.of_context ? group.context : group.n;
      const Element* grad = group.grads[i];
      if (grad_w[i]) grad_w[i].add(host, grad, tokens.rows, inputs, !later, last, part.grad_b);
      else if (part.grad_b != nullptr)
        add_rows(host, grad, part.features, tokens.panels(), part.grad_b, later);
    }
    if (grad_w_out)
      grad_w_out.add(host, attended, group.tokens(false).rows, static_cast<const Word<W>*>(group.u), !later, last, nullptr);
    float* const vectors[3] = {a.grad_b_out, a.grad_norm_weight, a.grad_norm_bias};
    for (int i = 0; i < 3; ++i)
      if (vectors[i] != nullptr) add_partial(group.partial + i * a.width, panels, 3 * a.width, a.width, vectors[i], later);
    if (a.grad_qk_scale == nullptr) continue;
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

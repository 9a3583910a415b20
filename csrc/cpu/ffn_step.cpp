// The FFN step, forward and backward: macaron_ops/reference/ffn_step.py.
//
// Forward, for a block of tokens: N(x) -> chunk of hidden channels -> its share of the output, chunk after chunk, so that
// the hidden activations stay in cache; then residual and dropout. Backward, for a group of blocks: the hidden
// activations and their gradients of the whole group, grad_x; then the group's share of the weights' gradients.
#include "blocks.h"
#include "ffn_hidden.h"
#include "parameter_gradients.h"
#include "residual.h"

namespace macaron_ops::MACARON_OPS_ISA {
namespace {

// Hidden channels whose activations stay in the L1 and L2 caches. Whole segments, so that the output is summed in the same
// order whether its chunks come one by one or all at once.
template <class WordT>
constexpr int64_t kChunk = kAmx<WordT> ? 2048 : kLargeL2 ? 4 * kSegment : kSegment;
// Panels whose hidden activations exist at a time in the backward pass: weights are read once for each of these groups.
template <class WordT>
constexpr int64_t kGroupPanels = kAmx<WordT> ? 16 : 8;

template <class X, class W>
int64_t pre_activations(const FFNStep<X, W>& a) { return is_gated(a.activation) ? 2 * a.hidden : a.hidden; }

template <class X, class W>
struct Block {
  const FFNStep<X, W>& a;
  int64_t first, panels;  // panels of tokens

  int64_t rows(int64_t p) const { return tokens_of(first + p, a.rows); }
  int64_t token(int64_t p) const { return (first + p) * kPanel; }
  int64_t lanes(int64_t p) const { return round_up(rows(p), kLanes); }
  const X* x(int64_t p) const { return a.x + token(p) * a.width; }
  Norm norm() const { return a.residual.pre ? a.norm : Norm{NormKind::none, 0.f, nullptr, nullptr}; }
};

template <class X, class W>
void normalize_block(const Host& host, const Block<X, W>& block, Word<W>* n, Word<W>* columns) {
  if (n == nullptr && columns == nullptr) return;
  const int64_t size = words_of<Word<W>>(block.a.width) * kPanel;
  parallel(host, block.panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      normalize_to_panel(block.x(p), block.rows(p), block.a.width, block.norm(), n == nullptr ? nullptr : n + p * size,
                         columns, p * kPanel, block.panels * kPanel);
  });
}

// Of `count` hidden channels from f0: their pre-activations into `saved`, their activations into h; null if not needed.
template <class X, class W>
void hidden_block(const Host& host, const Block<X, W>& block, const Word<W>* n, int64_t f0, int64_t count, W* saved,
                  Word<W>* h) {
  using WordT = Word<W>;
  const auto& a = block.a;
  const Drop drop(a.activation_dropout);
  const Hidden<W> hidden(a.activation);
  auto tile = [&](auto halves, int64_t f, int64_t rows, const Left<Packed<W>>* left, int64_t p) {
    alignas(64) float z[2][kRows<WordT> * kPanel];
    for (int half = 0; half < halves(); ++half) {
      tile_rows(rows, left[half], n + p * words_of<WordT>(a.width) * kPanel, kPanel, block.rows(p), z[half], kPanel,
                false, chain_for(a.rows, a.hidden));
      const int64_t channel = half * a.hidden + f0 + f;
      W* keep = saved == nullptr ? nullptr : saved + (p * pre_activations(block.a) + channel) * kPanel;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
          float* at = z[half] + i * kPanel + lane;
          const Vec v = lane < block.lanes(p) ? load(at) + (a.b_in == nullptr ? 0.f : a.b_in[channel + i]) : Vec{};
          store(at, v);
          if (keep != nullptr) store(keep + i * kPanel + lane, v);
        }
    }
    if (h != nullptr)
      hidden.forward({f0 + f, rows, a.hidden, block.token(p), block.rows(p)}, drop, z[0], z[1],
                     h + (p * words_of<WordT>(count) + f / kElements<WordT>) * kPanel);
  };
  const Weight<W> gate{a.w_in + f0 * a.width, a.width, 1}, up{gate.p + a.hidden * a.width, a.width, 1};
  auto run = [&](auto halves, const auto& weights) {
    each_tile(host, weights, count, 0, a.width, a.width, block.panels,
              [&](int64_t f, int64_t rows, const Left<Packed<W>>* left, int64_t p, int64_t) {
                tile(halves, f, rows, left, p);
              });
  };
  const Weight<W> one[1] = {gate}, two[2] = {gate, up};
  if (is_gated(a.activation)) run([] { return 2; }, two);
  else run([] { return 1; }, one);
}

// sums[p] (+)= w[:, k0 : k0 + k] b[p], with sums (rows, kPanel) floats and b `stride` words per panel.
template <class X, class W>
void product_block(const Host& host, const Block<X, W>& block, const Weight<W>& w, int64_t rows, int64_t k0, int64_t k,
                   const Word<W>* b, int64_t stride, float* sums, bool accumulate) {
  const Weight<W> weights[1] = {w};
  each_tile(host, weights, rows, k0, k, columns_of(w, k), block.panels,
            [&](int64_t i, int64_t count, const Left<Packed<W>>* left, int64_t p, int64_t c) {
              tile_rows(count, *left, b + p * stride + c / kElements<Word<W>> * kPanel, kPanel, block.rows(p),
                        sums + (p * rows + i) * kPanel, kPanel, accumulate || c > 0, chain_for(block.a.rows, rows));
            });
}

// y, the sum before the post-norm and the pre-activations of a block; null where not needed.
template <class X, class W>
void forward_block(const Host& host, const Block<X, W>& block, const Word<W>* n, W* saved_hidden, X* saved_total, X* y) {
  using WordT = Word<W>;
  const auto& a = block.a;
  const int64_t chunk = host.threads > 1 ? a.hidden : smaller(kChunk<WordT>, a.hidden);
  const int64_t n_size = words_of<WordT>(a.width) * kPanel, h_size = words_of<WordT>(chunk) * kPanel;
  const Buffer<WordT> normalized(host, n == nullptr ? block.panels * n_size : 0), h(host, block.panels * h_size);
  const Buffer<float> u(host, block.panels * a.width * kPanel);
  if (n == nullptr) {
    normalize_block<X, W>(host, block, normalized, nullptr);
    n = normalized;
  }
  if (a.hidden == 0)
    for (int64_t i = 0; i < block.panels * a.width * kPanel; ++i) u[i] = 0.f;
  for (int64_t f = 0; f < a.hidden; f += chunk) {
    const int64_t count = smaller(chunk, a.hidden - f);
    hidden_block<X, W>(host, block, n, f, count, saved_hidden, h);
    product_block<X, W>(host, block, {a.w_out, a.hidden, 1}, a.width, f, count, h, words_of<WordT>(count) * kPanel, u,
                        f > 0);
  }
  parallel(host, block.panels, [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch(host, a.residual.pre ? 0 : kPanel * a.width);
    for (int64_t p = begin; p < end; ++p)
      residual_forward(u + p * a.width * kPanel, a.b_out, block.token(p), block.rows(p), a.width, a.residual, a.norm,
                       block.x(p), y == nullptr ? nullptr : y + block.token(p) * a.width,
                       saved_total == nullptr ? nullptr : saved_total + p * kPanel * a.width, scratch);
  });
}

// What the backward pass of a group of panels hands on to the gradients of the parameters.
template <class W>
struct Group {
  Buffer<Word<W>> n_columns, u_columns;  // of N(x) and of the gradient in u
  Buffer<Packed<W>> h, z;  // hidden activations, pre-activations and then their gradients: [panel][channel][kPanel]
  Buffer<float> partial;   // [panel][3][width]: sums for b_out, norm_weight, norm_bias

  template <class X>
  Group(const Host& host, const FFNStep<X, W>& a, int64_t panels)
      : n_columns(host, a.grad_w_in == nullptr ? 0 : size(a.width, panels)),
        u_columns(host, a.grad_w_out == nullptr ? 0 : size(a.width, panels)),
        h(host, a.grad_w_out == nullptr ? 0 : panels * a.hidden * kPanel),
        z(host, panels * pre_activations(a) * kPanel),
        partial(host, panels * 3 * a.width) {}

  static int64_t size(int64_t width, int64_t panels) {
    return round_up(width, kPanel) * panels * kPanel / kElements<Word<W>>;
  }
  RowSums sums(int64_t p, int64_t width) const {
    float* at = partial + p * 3 * width;
    return {at, at + width, at + 2 * width};
  }
};

template <class X, class W>
void backward_block(const Host& host, const Block<X, W>& block, const Group<W>& group) {
  using WordT = Word<W>;
  using Element = Packed<W>;
  const auto& a = block.a;
  const bool gated = is_gated(a.activation), pre = a.residual.pre;
  const int64_t channels = pre_activations(block.a), d_size = words_of<WordT>(a.width) * kPanel;
  const int64_t tokens = block.panels * kPanel;

  // What the forward pass did not save is computed again, as it would have saved it.
  const bool lacks_total = !pre && a.saved_total == nullptr;
  const bool lacks_hidden = a.saved_hidden == nullptr;
  const Buffer<WordT> grad_u(host, block.panels * d_size);
  WordT* n = lacks_hidden || lacks_total ? static_cast<WordT*>(grad_u) : nullptr;  // where the gradient in u comes later
  normalize_block<X, W>(host, block, n, group.n_columns);

  constexpr bool apart = sizeof(W) != sizeof(Element);  // else the pre-activations lie where their gradients will
  const Buffer<W> own_hidden(host, apart && lacks_hidden ? block.panels * channels * kPanel : 0);
  const Buffer<X> own_total(host, lacks_total ? block.panels * kPanel * a.width : 0);
  W* missing_hidden = own_hidden;
  if constexpr (!apart) missing_hidden = lacks_hidden ? static_cast<W*>(group.z) : nullptr;
  const W* z = lacks_hidden ? missing_hidden : a.saved_hidden + block.first * channels * kPanel;
  const X* total = lacks_total ? own_total : pre ? nullptr : a.saved_total + block.token(0) * a.width;
  if (lacks_total) forward_block<X, W>(host, block, n, missing_hidden, own_total, nullptr);
  else if (missing_hidden != nullptr) hidden_block<X, W>(host, block, n, 0, a.hidden, missing_hidden, nullptr);

  const Buffer<float> grad_total(host, pre ? 0 : block.panels * kPanel * a.width);
  parallel(host, block.panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      residual_backward<WordT>(a.grad + block.token(p) * a.width, block.token(p), block.rows(p), a.width, a.residual,
                               a.norm, total == nullptr ? nullptr : total + p * kPanel * a.width,
                               pre ? nullptr : grad_total + p * kPanel * a.width, grad_u + p * d_size,
                               static_cast<WordT*>(group.u_columns), p * kPanel, tokens,
                               group.sums(p, a.width));
  });

  // Words of the gradients of the pre-activations, [panel][gate, up][chunk]: where elements are words they serve as such.
  const int64_t chunk = host.threads > 1 ? a.hidden : smaller(kChunk<WordT>, a.hidden);
  constexpr bool words_apart = kElements<WordT> > 1;
  const int64_t z_size = words_of<WordT>(chunk) * kPanel;
  const Buffer<WordT> z_words(host, words_apart ? block.panels * (1 + gated) * z_size : 0);
  const bool needs_n = a.grad_x != nullptr || (pre && (a.grad_norm_weight != nullptr || a.grad_norm_bias != nullptr));
  const Buffer<float> grad_n(host, needs_n ? block.panels * a.width * kPanel : 0);
  const Drop drop(a.activation_dropout);
  const Hidden<W> hidden(a.activation);
  if (a.hidden == 0 && needs_n)
    for (int64_t i = 0; i < block.panels * a.width * kPanel; ++i) grad_n[i] = 0.f;
  for (int64_t f0 = 0; f0 < a.hidden; f0 += chunk) {
    const int64_t count = smaller(chunk, a.hidden - f0);
    const Weight<W> w_out[1] = {{a.w_out + f0, 1, a.hidden}};
    each_tile(host, w_out, count, 0, a.width, a.width, block.panels,
              [&](int64_t f, int64_t rows, const Left<Element>* left, int64_t p, int64_t) {
                alignas(64) float grad_h[kRows<WordT> * kPanel];
                tile_rows(rows, *left, grad_u + p * d_size, kPanel, block.rows(p), grad_h, kPanel, false,
                          chain_for(a.rows, a.hidden));
                const W* z_tile = z + (p * channels + f0 + f) * kPanel;
                Element* to_z = group.z + (p * channels + f0 + f) * kPanel;
                HiddenGradients<Element, WordT> out{nullptr, to_z, to_z + a.hidden * kPanel, nullptr, nullptr};
                if (group.h != nullptr) out.h = group.h + (p * a.hidden + f0 + f) * kPanel;
                if (words_apart) {
                  out.z_words = z_words + p * (1 + gated) * z_size + f / kElements<WordT> * kPanel;
                  out.up_words = out.z_words + z_size;
                }
                hidden.backward({f0 + f, rows, a.hidden, block.token(p), block.rows(p)}, drop, z_tile,
                                z_tile + a.hidden * kPanel, grad_h, out);
              });
    for (int half = 0; needs_n && half <= gated; ++half) {
      const int64_t channel = half * a.hidden + f0;
      const WordT* words = z_words + half * z_size;
      int64_t stride = (1 + gated) * z_size;
      if constexpr (!words_apart) {
        words = group.z + channel * kPanel;
        stride = channels * kPanel;
      }
      product_block<X, W>(host, block, {a.w_in, 1, a.width}, a.width, channel, count, words, stride, grad_n,
                          f0 > 0 || half > 0);
    }
  }
  if (!needs_n) return;
  parallel(host, block.panels, [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch(host, kPanel * a.width);
    for (int64_t p = begin; p < end; ++p)
      input_backward(grad_n + p * a.width * kPanel, a.grad + block.token(p) * a.width,
                     pre ? nullptr : grad_total + p * kPanel * a.width, block.rows(p), a.width,
                     a.residual, a.norm, block.x(p),
                     a.grad_x == nullptr ? nullptr : a.grad_x + block.token(p) * a.width, scratch,
                     group.sums(p, a.width));
  });
}

// As many as fit into the memory that sums over several groups would take; else a few.
template <class X, class W>
int64_t panels_of_group(const FFNStep<X, W>& a, int64_t all) {
  const int64_t few = smaller(kGroupPanels<Word<W>> / (a.saved_hidden == nullptr ? 2 : 1), all);
  int64_t sums = 0;
  if (a.grad_w_in != nullptr) sums += MatrixGradient<W>::bytes_beside(pre_activations(a), a.width);
  if (a.grad_w_out != nullptr) sums += MatrixGradient<W>::bytes_beside(a.hidden, a.width);
  const int64_t panel = (a.hidden + pre_activations(a) + 3 * a.width) * sizeof(Packed<W>) + a.width * sizeof(float);
  return (all - few) * panel * kPanel <= sums ? all : few;
}

}  // namespace

template <class X, class W>
void ffn_step_forward(const FFNStep<X, W>& a, const Host& host) {
  const Division<Word<W>> division(host, a.rows);
  const int64_t channels = pre_activations(a);
  division.run(host, 0, division.panels, [&](const Host& inner, int64_t first, int64_t panels) {
    const Block<X, W> block{a, first, panels};
    forward_block<X, W>(inner, block, nullptr,
                        a.saved_hidden == nullptr ? nullptr : a.saved_hidden + first * channels * kPanel,
                        a.saved_total == nullptr ? nullptr : a.saved_total + first * kPanel * a.width, a.y);
  });
}

template <class X, class W>
void ffn_step_backward(const FFNStep<X, W>& a, const Host& host) {
  const int64_t channels = pre_activations(a);
  const int64_t all = ceil_div(a.rows, kPanel), group_panels = panels_of_group(a, all);
  const bool several = group_panels < all;
  const Group<W> group(host, a, group_panels);
  MatrixGradient<W> grad_w_in(host, a.grad_w_in, channels, a.width, false, several);
  MatrixGradient<W> grad_w_out(host, a.grad_w_out, a.hidden, a.width, true, several);
  for (int64_t first = 0; first < all; first += group_panels) {
    const int64_t panels = smaller(group_panels, all - first);
    const bool later = first > 0, last = first + panels == all;
    for (int64_t i = 0; i < panels * 3 * a.width; ++i) group.partial[i] = 0.f;
    backward_block<X, W>(host, {a, first, panels}, group);
    const int64_t tokens = smaller(panels * kPanel, a.rows - first * kPanel);
    if (grad_w_in) grad_w_in.template add<Word<W>>(host, group.z, tokens, group.n_columns, !later, last, a.grad_b_in);
    else if (a.grad_b_in != nullptr) add_rows<Packed<W>>(host, group.z, channels, panels, a.grad_b_in, later);
    if (grad_w_out) grad_w_out.template add<Word<W>>(host, group.h, tokens, group.u_columns, !later, last, nullptr);
    float* const vectors[3] = {a.grad_b_out, a.grad_norm_weight, a.grad_norm_bias};
    for (int i = 0; i < 3; ++i)
      if (vectors[i] != nullptr)
        add_partial(group.partial + i * a.width, panels, 3 * a.width, a.width, vectors[i], later);
  }
}

#define MACARON_INSTANTIATE(X, W)                                        \
  template void ffn_step_forward(const FFNStep<X, W>&, const Host&); \
  template void ffn_step_backward(const FFNStep<X, W>&, const Host&);
MACARON_INSTANTIATE(float, float)
MACARON_INSTANTIATE(bf16, bf16)
MACARON_INSTANTIATE(float, bf16)
#undef MACARON_INSTANTIATE

}  // namespace macaron_ops::MACARON_OPS_ISA

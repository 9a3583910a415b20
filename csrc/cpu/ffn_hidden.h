// The hidden activations of the FFN on one tile: kRows hidden channels of one panel of tokens.
#pragma once

#include "activation.h"
#include "dropout.h"
#include "panel.h"
#include "weight.h"

namespace macaron_ops::MACARON_OPS_ISA {

// Where the tile stands: its first hidden channel and token, for the positions of dropout.
struct HiddenTile {
  int64_t channel, rows, hidden;  // rows of `hidden` channels
  int64_t token, count;           // its tokens; the lanes beyond become zeros
};

// h = drop(act(z)), gated drop(act(z) up), as words. z and up are (rows, kPanel) in T.
template <Activation act, bool gated, class T, class WordT>
static void hidden_forward(const HiddenTile& at, const Drop& drop, const T* z, const T* up, WordT* h) {
  constexpr int step = kElements<WordT>;
  auto channel = [&](int64_t i, int64_t lane) -> Vec {
    if (i >= at.rows) return Vec{};
    Vec v = activate<act>(load(z + i * kPanel + lane));
    if constexpr (gated) v *= load(up + i * kPanel + lane);
    return drop(v, (at.token + lane) * at.hidden + at.channel + i, at.hidden);
  };
  for (int64_t i = 0; i < at.rows; i += step)
    for (int64_t lane = 0; lane < at.count; lane += kLanes)
      store_words(h + i / step * kPanel + lane, channel(i, lane), step == 1 ? Vec{} : channel(i + 1, lane));
}

// Gradients of a tile: from grad_h (rows, kPanel) to those in z and up, as elements and (where Words differ from
// elements) words; h again for the gradient of w_out. Null where not needed.
template <class Element, class WordT>
struct HiddenGradients {
  Element *h, *z, *up;
  WordT *z_words, *up_words;
};

template <Activation act, bool gated, class T, class Element, class WordT>
static void hidden_backward(const HiddenTile& at, const Drop& drop, const T* z, const T* up, const float* grad_h,
                            const HiddenGradients<Element, WordT>& out) {
  constexpr int step = kElements<WordT>;
  for (int64_t i = 0; i < at.rows; i += step)
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      Vec dz[step], dup[step];
      for (int s = 0; s < step; ++s) {
        const int64_t at_z = (i + s) * kPanel + lane;
        dz[s] = dup[s] = Vec{};
        if (i + s >= at.rows) continue;
        Vec h = {};
        if (lane < at.count) {
          const int64_t position = (at.token + lane) * at.hidden + at.channel + i + s;
          const Vec pre = load(z + at_z);
          h = activate<act>(pre);
          Vec g = load(grad_h + at_z);
          const VecI kept = drop ? drop.kept(position, at.hidden) : VecI{};
          if (drop) g = drop.scaled(g, kept);
          if constexpr (gated) {
            const Vec linear = load(up + at_z);
            dup[s] = g * h;
            g *= linear;
            h *= linear;
          }
          dz[s] = activate_backward<act>(g, pre);
          if (drop) h = drop.scaled(h, kept);
          // Sums over tokens read these lanes, and padding may be inf or NaN where a parameter is.
          h = first_of(h, at.count - lane);
          dz[s] = first_of(dz[s], at.count - lane);
          dup[s] = first_of(dup[s], at.count - lane);
        }
        if (out.h != nullptr) store(out.h + at_z, h);
        store(out.z + at_z, dz[s]);
        if constexpr (gated) store(out.up + at_z, dup[s]);
      }
      if constexpr (step == 2) {
        store_words(out.z_words + i / step * kPanel + lane, dz[0], dz[1]);
        if constexpr (gated) store_words(out.up_words + i / step * kPanel + lane, dup[0], dup[1]);
      }
    }
}

// The functions of an activation, chosen once per call.
template <class W>
struct Hidden {
  using Element = Packed<W>;
  using WordT = Word<W>;
  void (*forward)(const HiddenTile&, const Drop&, const float*, const float*, WordT*);
  void (*backward)(const HiddenTile&, const Drop&, const W*, const W*, const float*,
                   const HiddenGradients<Element, WordT>&);

  template <Activation act, bool gated>
  static Hidden of() {
    return {hidden_forward<act, gated, float, WordT>, hidden_backward<act, gated, W, Element, WordT>};
  }
  explicit Hidden(Activation a) {
    switch (a) {
      case Activation::relu: *this = of<Activation::relu, false>(); break;
      case Activation::gelu: *this = of<Activation::gelu, false>(); break;
      case Activation::gelu_tanh: *this = of<Activation::gelu_tanh, false>(); break;
      case Activation::silu: *this = of<Activation::silu, false>(); break;
      case Activation::swiglu: *this = of<Activation::silu, true>(); break;
      case Activation::geglu: *this = of<Activation::gelu, true>(); break;
    }
  }

 private:
  Hidden(decltype(forward) f, decltype(backward) b) : forward(f), backward(b) {}
};

}  // namespace macaron_ops::MACARON_OPS_ISA

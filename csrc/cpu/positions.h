// What happens to queries and keys between projection and scores, lane by lane: rotary embedding of the first channels
// in the half-split convention (Su et al. 2021, arXiv 2104.09864), then unit vectors times a scale per channel (nGPT,
// arXiv 2410.01131). A block is [head_dim][kPanel] floats, lanes are tokens.
#pragma once

#include "heads.h"
#include "math.h"

namespace macaron_ops::MACARON_OPS_ISA {

constexpr float kUnitEps = 1e-12f;  // as torch.nn.functional.normalize

class Positions {
 public:
  // cos and sin are (tokens, rotated), turned here into lanes of tokens; null: no rotary embedding.
  Positions(const Host& host, const float* cos, const float* sin, int64_t tokens, int64_t rotated, const float* scale,
            int64_t scale_stride)
      : tokens_(tokens),
        rotated_(cos == nullptr ? 0 : rotated),
        scale_(scale),
        scale_stride_(scale_stride),
        cos_(host, rotated_ * tokens + kSlack),
        sin_(host, rotated_ * tokens + kSlack) {
    for (int64_t r = 0; r < rotated_; ++r)
      for (int64_t t = 0; t < tokens; ++t) {
        cos_[r * tokens + t] = cos[t * rotated + r];
        sin_[r * tokens + t] = sin[t * rotated + r];
      }
  }

  explicit operator bool() const { return rotated_ > 0 || scale_ != nullptr; }

  void forward(float* block, int64_t head, int64_t head_dim, int64_t token, int64_t count) const {
    for (int64_t lane = 0; lane < count; lane += kLanes) {
      rotate(block + lane, token + lane, false);
      if (scale_ == nullptr) continue;
      const Vec divisor = at_least(length(block + lane, head_dim), broadcast(kUnitEps));
      for (int64_t c = 0; c < head_dim; ++c) {
        float* at = block + c * kPanel + lane;
        store(at, load(at) / divisor * scale_[head * scale_stride_ + c]);
      }
    }
  }

  // Gradients in place, from those of positioned heads to those of projected ones, of which `projected` is the block
  // (rotated here). Adds to grad_scale [head_dim] where that is not null.
  void backward(float* grad, float* projected, int64_t head, int64_t head_dim, int64_t token, int64_t count,
                float* grad_scale) const {
    for (int64_t lane = 0; lane < count; lane += kLanes) {
      if (scale_ != nullptr) {
        rotate(projected + lane, token + lane, false);
        const Vec whole = length(projected + lane, head_dim), divisor = at_least(whole, broadcast(kUnitEps));
        Vec parts[4] = {};  // of the radial component: shorter chains of sums, smaller errors
        for (int64_t c = 0; c < head_dim; ++c) {
          float* at = grad + c * kPanel + lane;
          const Vec y = load(projected + c * kPanel + lane) / divisor;  // |y| is 1 as closely as can be
          if (grad_scale != nullptr) grad_scale[c] += sum(first_of(load(at) * y, count - lane));
          const Vec g = load(at) * scale_[head * scale_stride_ + c];
          parts[c % 4] += g * y;
          store(at, g);
        }
        const Vec sum = (parts[0] + parts[1]) + (parts[2] + parts[3]), radial = choose(whole >= kUnitEps, sum, Vec{});
        for (int64_t c = 0; c < head_dim; ++c) {
          float* at = grad + c * kPanel + lane;
          const Vec y = load(projected + c * kPanel + lane) / divisor;
          store(at, (load(at) - y * radial) / divisor);
        }
      }
      rotate(grad + lane, token + lane, true);
    }
  }

 private:
  void rotate(float* block, int64_t token, bool back) const {
    for (int64_t r = 0; r < rotated_; ++r) {
      float *first = block + r * kPanel, *second = block + (rotated_ + r) * kPanel;
      const Vec u = load(first), w = load(second), cos = load(cos_ + r * tokens_ + token);
      const Vec s = load(sin_ + r * tokens_ + token), sin = back ? -s : s;
      store(first, u * cos - w * sin);
      store(second, w * cos + u * sin);
    }
  }
  static Vec length(const float* block, int64_t head_dim) {
    Vec squares[4] = {};
    for (int64_t c = 0; c < head_dim; ++c) squares[c % 4] += load(block + c * kPanel) * load(block + c * kPanel);
    return square_root((squares[0] + squares[1]) + (squares[2] + squares[3]));
  }

  int64_t tokens_, rotated_;
  const float* scale_;
  int64_t scale_stride_;
  Buffer<float> cos_, sin_;
};

// -- blocks of a head ------------------------------------------------------------------------------------------------

// The block of tokens from `token` on as floats; and back, by channel.
static inline void load_block(const Head<float>& head, int64_t token, int64_t count, float* block) {
  for (int64_t c = 0; c < head.at.head_dim; ++c)
    for (int64_t l = 0; l < count; l += kLanes) store(block + c * kPanel + l, load(head.lanes(token) + c * head.at.width + l));
}
static inline void load_block(const Head<Pair>& head, int64_t token, int64_t count, float* block) {
  for (int64_t c = 0; c < head.at.head_dim; c += 2)
    for (int64_t l = 0; l < count; l += kLanes) {
      VecU pair;
      std::memcpy(&pair, head.lanes(token) + c / 2 * head.at.width + l, sizeof pair);
      store(block + c * kPanel + l, of_bits(pair << 16));
      if (c + 1 < head.at.head_dim) store(block + (c + 1) * kPanel + l, of_bits(pair & 0xffff0000u));
    }
}
static inline void store_block(const float* block, int64_t token, int64_t count, const HeadPanels& at, float* head) {
  for (int64_t c = 0; c < at.head_dim; ++c)
    for (int64_t l = 0; l < count; l += kLanes)
      store_part(head + at.word(token) + c * at.width + l, load(block + c * kPanel + l), count - l);
}
static inline void store_block(const float* block, int64_t token, int64_t count, const HeadPanels& at, Pair* head) {
  for (int64_t c = 0; c < at.head_dim; c += 2)
    for (int64_t l = 0; l < count; l += kLanes) {
      const VecU first = rounded_bits(load(block + c * kPanel + l));
      const VecU second = c + 1 < at.head_dim ? rounded_bits(load(block + (c + 1) * kPanel + l)) : VecU{};
      store_part(head + at.word(token) + c / 2 * at.width + l, first | second << 16, count - l);
    }
}

// Positioned heads from projected ones.
template <class WordT>
static void position_heads(const Host& host, const Positions& positions, const AllHeads<WordT>& from, int64_t sequences,
                           const AllHeads<WordT>& to) {
  const HeadPanels& at = from.at;
  parallel(host, sequences * from.heads, [&](int64_t begin, int64_t end) {
    const Buffer<float> block(host, at.head_dim * kPanel);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / from.heads, head = i % from.heads;
      for (int64_t token = 0; token < at.tokens; token += kPanel) {
        const int64_t count = smaller<int64_t>(kPanel, at.tokens - token);
        load_block(from(sequence, head), token, count, block);
        positions.forward(block, head, at.head_dim, token, count);
        store_block(block, token, count, at, to.head(sequence, head));
      }
    }
  });
}

}  // namespace macaron_ops::MACARON_OPS_ISA

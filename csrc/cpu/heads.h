// Panels of heads: the tokens of one sequence and head side by side in lanes, as the products of attention want them.
//
//   by channel   [ceil(head_dim / kElements)][width] words: a product contracts over channels; lanes are tokens (right
//                operand), or rows are tokens (left operand)
//   by token     [head_dim][width] elements: a product contracts over tokens; rows are channels (left operand)
//
// For float both are one array. A sequence of up to 2 kPanel tokens is one panel as wide as it is long, so that short
// sequences cost no padding; longer ones are panels of kPanel tokens. Vectors may be read beyond the last token, where
// the next channel or the slack at the end of a buffer lies: such lanes never reach a result.
#pragma once

#include "head_panels.h"
#include "panel.h"

namespace macaron_ops::MACARON_OPS_ISA {

constexpr int64_t kSlack = HeadPanels::kSlack;
static_assert(HeadPanels::kLanes == kPanel);

// One head's tokens of one sequence.
template <class WordT>
struct Head {
  using Element = typename Arithmetic<WordT>::Element;
  static constexpr int kStep = kElements<WordT>;

  const WordT* words;
  HeadPanels at;

  const Element* elements() const { return reinterpret_cast<const Element*>(words); }

  // By channel, as right operand: lanes are the tokens of a block.
  const WordT* lanes(int64_t token) const { return words + at.word(token); }
  // By channel, as left operand: rows are tokens, all of one panel.
  Left<Element> rows(int64_t token) const {
    return {elements() + at.word(token) * kStep, kStep, at.width * kStep, words_of<WordT>(at.head_dim)};
  }
  // By token, as left operand: rows are channels; `count` tokens of a panel, or of each of several.
  Left<Element> channels(int64_t token, int64_t count, int64_t panels = 1) const {
    return {elements() + token / at.width * at.size * kStep + token % at.width, at.width, kStep,
            words_of<WordT>(count), panels, at.size * kStep};
  }
};

MACARON_INLINE void store_part(Pair* p, VecU v, int64_t count) { store_part(reinterpret_cast<float*>(p), of_bits(v), count); }

// -- from the panels of all tokens to those of heads -----------------------------------------------------------------

// Tokens that lie side by side both in a panel of all tokens and in one of heads.
struct Segment {
  int64_t lane, count;      // in the panel of all tokens
  int64_t sequence, token;  // the first one
  bool last;                // the last one is the sequence's last
};

// The segments of the tokens first ... first + count, at most kPanel of them.
static inline int segments_of(int64_t first, int64_t count, const HeadPanels& at, Segment* segments) {
  int n = 0;
  for (int64_t lane = 0; lane < count; ++n) {
    const int64_t token = (first + lane) % at.tokens;
    const int64_t length = smaller(smaller(count - lane, at.width - token % at.width), at.tokens - token);
    segments[n] = {lane, length, (first + lane) / at.tokens, token, token + length == at.tokens};
    lane += length;
  }
  return n;
}

// The panels of `heads` heads of all sequences, [sequence][head], and whether their words go along tokens.
template <class WordT>
struct AllHeads {
  WordT* words;
  int64_t heads;
  HeadPanels at;
  bool by_token;

  WordT* head(int64_t sequence, int64_t head) const { return words + (sequence * heads + head) * at.words(); }
  Head<WordT> operator()(int64_t sequence, int64_t h) const { return {head(sequence, h), at}; }
};

// A row of a product, [kPanel] floats of which a segment is wanted, to one channel of a head; `bias` is added.
MACARON_INLINE void scatter_row(const float* row, float bias, const Segment& s, int64_t channel,
                                const AllHeads<float>& to, float* head) {
  float* out = head + to.at.word(s.token) + channel * to.at.width;
  for (int64_t l = 0; l < s.count; l += kLanes)
    store_part(out + l, load(row + s.lane + l) + bias, s.count - l);
}

// Rows of a product, [rows][kPanel] floats with a vector's slack, to the heads' channels from `feature` on.
static inline void scatter(const float* tile, const float* bias, int64_t rows, int64_t feature, const Segment* segments,
                           int count, const AllHeads<float>& to) {
  for (int s = 0; s < count; ++s) {
    int64_t head = feature / to.at.head_dim, channel = feature % to.at.head_dim;
    for (int64_t i = 0; i < rows; ++i) {
      scatter_row(tile + i * kPanel, bias == nullptr ? 0.f : bias[feature + i], segments[s], channel, to,
                  to.head(segments[s].sequence, head));
      if (++channel == to.at.head_dim) channel = 0, ++head;
    }
  }
}

static inline void scatter(const float* tile, const float* bias, int64_t rows, int64_t feature, const Segment* segments,
                           int count, const AllHeads<Pair>& to) {
  const HeadPanels& at = to.at;
  for (int n = 0; n < count; ++n) {
    const Segment& s = segments[n];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t channel = (feature + i) % at.head_dim;
      Pair* panel = to.head(s.sequence, (feature + i) / at.head_dim) + at.word(s.token) - s.token % at.width;
      const float* row = tile + i * kPanel + s.lane;
      const float b = bias == nullptr ? 0.f : bias[feature + i];
      if (to.by_token) {
        bf16* out = reinterpret_cast<bf16*>(panel) + channel * at.width + s.token % at.width;
        for (int64_t l = 0; l < s.count; l += kLanes)
          store_part(out + l, load(row + l) + b, s.count - l);
        if (s.last && (s.token + s.count) % 2 != 0) out[s.count] = bf16{0};  // the other half of the last pair
        continue;
      }
      Pair* out = panel + channel / 2 * at.width + s.token % at.width;
      if (at.head_dim % 2 == 0) {  // rows come in pairs, too: tiles are of an even number of rows
        const float b1 = bias == nullptr ? 0.f : bias[feature + i + 1];
        for (int64_t l = 0; l < s.count; l += kLanes)
          store_part(out + l, rounded_bits(load(row + l) + b) | rounded_bits(load(row + kPanel + l) + b1) << 16,
                      s.count - l);
        ++i;
        continue;
      }
      for (int64_t l = 0; l < s.count; ++l) {
        bf16* half = reinterpret_cast<bf16*>(out + l);
        half[channel % 2] = to_bf16(row[l] + b);
        if (channel == at.head_dim - 1) half[1] = bf16{0};
      }
    }
  }
}

// -- and back --------------------------------------------------------------------------------------------------------

// Panels of all tokens with `features` channels, as words, elements, or both; null: not wanted. Token 0 is lane 0 of the
// words and lane `lane` of the elements, whose first panel may begin with the tokens of others.
template <class WordT, class Element>
struct TokenPanels {
  WordT* words;
  Element* elements;
  int64_t features;
  int64_t lane = 0;

  // Channels [rows][kPanel], with a vector's slack, of `count` tokens, at most kPanel, from `token` on: to the channels
  // from `feature` on.
  void put(const float* from, int64_t rows, int64_t feature, int64_t token, int64_t count) const {
    if (words != nullptr)
      each_panel(token, count, [&](int64_t done, int64_t panel, int64_t at, int64_t n) {
        put_words(from + done, rows, feature, n, words + panel * words_of<WordT>(features) * kPanel + at);
      });
    if (elements != nullptr)
      each_panel(lane + token, count, [&](int64_t done, int64_t panel, int64_t at, int64_t n) {
        put_elements(from + done, rows, n, elements + (panel * features + feature) * kPanel + at);
      });
  }

 private:
  template <class Part>
  static void each_panel(int64_t token, int64_t count, const Part& part) {
    for (int64_t done = 0; done < count;) {
      const int64_t at = (token + done) % kPanel, n = smaller(count - done, kPanel - at);
      part(done, (token + done) / kPanel, at, n);
      done += n;
    }
  }
  template <class T>
  static void put_elements(const float* from, int64_t rows, int64_t count, T* out) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t l = 0; l < count; l += kLanes) store_part(out + i * kPanel + l, load(from + i * kPanel + l), count - l);
  }
  void put_words(const float* from, int64_t rows, int64_t feature, int64_t count, float* out) const {
    put_elements(from, rows, count, out + feature * kPanel);
  }
  void put_words(const float* from, int64_t rows, int64_t feature, int64_t count, Pair* out) const {
    if (feature % 2 == 0 && rows % 2 == 0) {
      for (int64_t i = 0; i < rows; i += 2)
        for (int64_t l = 0; l < count; l += kLanes) {
          const float* at = from + i * kPanel + l;
          store_part(out + (feature + i) / 2 * kPanel + l, rounded_bits(load(at)) | rounded_bits(load(at + kPanel)) << 16,
                     count - l);
        }
      return;
    }
    for (int64_t i = 0; i < rows; ++i)  // a pair may be of two heads, which two threads write
      for (int64_t l = 0; l < count; ++l) {
        bf16* half = reinterpret_cast<bf16*>(out + (feature + i) / 2 * kPanel + l);
        half[(feature + i) % 2] = to_bf16(from[i * kPanel + l]);
        if (feature + i == features - 1 && features % 2 != 0) half[1] = bf16{0};
      }
  }
};

}  // namespace macaron_ops::MACARON_OPS_ISA

// The inputs of sphere_attend_step as its loops want them, and in which regime the weights are computed.
#pragma once

#include "move.h"
#include "sphere_blocked.h"
#include "sphere_small.h"

namespace macaron_ops::MACARON_OPS_ISA {

// -- particles as left operands --------------------------------------------------------------------------------------

template <class WordT>
class OthersBuffer {
 public:
  using Element = typename Arithmetic<WordT>::Element;
  static constexpr int kStep = kElements<WordT>;

  // `rows` are where they are already, or null: then there is place for them, to be written before columns are.
  OthersBuffer(const Host& host, const Element* rows, int64_t batch, int64_t count, int64_t channels, bool columns)
      : given_(rows),
        count_(count),
        channels_(channels),
        rows_(host, rows == nullptr ? batch * count * channels : 0),
        columns_(host, columns && kStep > 1 ? batch * round_up(count, kStep) * channels : 0) {}

  Element* rows(int64_t b) { return rows_ + b * count_ * channels_; }

  // The columns of the rows begin ... end; begin is even.
  void write_columns(int64_t b, int64_t begin, int64_t end) {
    if (columns_ == nullptr) return;
    const Others<WordT> others = at(b);
    for (int64_t i = begin; i < end; i += kStep) {
      Element* out = const_cast<Element*>(others.columns) + i * channels_;
      for (int64_t c = 0; c < channels_; ++c)
        for (int s = 0; s < kStep; ++s) out[c * kStep + s] = i + s < count_ ? others.row(i + s)[c] : Element{};
    }
  }
  Others<WordT> at(int64_t b) const {
    const Element* rows = given_ != nullptr ? given_ : rows_;
    if (rows == nullptr) return {nullptr, nullptr, channels_};
    rows += b * count_ * channels_;
    if (columns_ == nullptr) return {rows, rows, channels_};
    return {rows, columns_ + b * round_up(count_, kStep) * channels_, channels_};
  }

 private:
  const Element* given_;
  int64_t count_, channels_;
  Buffer<Element> rows_, columns_;
};

// A tensor's rows as panel of owners; channels from `width` to `padded` are zeros.
template <class X>
static void owners_panel(const X* rows, int64_t count, int64_t width, int64_t padded, float* panel) {
  rows_to_panel(rows, count, width, padded, panel);
}
template <class X>
static void owners_panel(const X* rows, int64_t count, int64_t width, int64_t, Pair* panel) {
  fill_panel<Pair>(count, width, panel, nullptr, 0, 0,
                   [&](int64_t i, int64_t c, int64_t n) { return load_part(rows + i * width + c, n); });
}

// -- how far scores reach --------------------------------------------------------------------------------------------

// Squares of the lengths of rows.
struct Lengths {
  float longest = 0.f, shortest = __builtin_inff();
  bool finite = true;  // so is every element
};

template <class X>
static Lengths lengths_of(const X* rows, int64_t count, int64_t width) {
  Lengths lengths;
  for (int64_t i = 0; i < count; ++i, rows += width) {
    float square = 0.f;
    int64_t c = 0;
    if (width >= kLanes) {
      Vec squares = {};
      for (; c + kLanes <= width; c += kLanes) squares += load(rows + c) * load(rows + c);
      square = sum(squares);
    }
    for (; c < width; ++c) square += to_float(rows[c]) * to_float(rows[c]);
    lengths.longest = larger(lengths.longest, square);
    lengths.shortest = smaller(lengths.shortest, square);
    lengths.finite = lengths.finite && square <= __FLT_MAX__;
  }
  return lengths;
}

struct Regime {
  bool bounded, finite;
  float shift, largest;  // see Particles
};

// Base-2 exponents within these cannot leave float32's range, neither in weights nor in sums of 2^40 of them.
constexpr float kSafe = 40.f;

template <class X>
static Regime regime_of(const SphereAttendStep<X>& a, int64_t b, float scale) {
  const X* x = a.x + b * a.rows * a.width;
  const bool itself = a.query == nullptr && a.key == nullptr;
  const Lengths own = lengths_of(x, a.rows, a.width);
  const Lengths q = a.query == nullptr ? own : lengths_of(a.query + b * a.rows * a.channels, a.rows, a.channels);
  const Lengths k = a.key == nullptr ? own : lengths_of(a.key + b * a.keys * a.channels, a.keys, a.channels);
  const Lengths v = a.value == nullptr ? own : lengths_of(a.value + b * a.keys * a.width, a.keys, a.width);
  const bool finite = q.finite && k.finite && v.finite && scale - scale == 0.f;
  // No |t_ij| is larger, by Cauchy and Schwarz; the factor is for the rounding of either side.
  const float most = __builtin_fabsf(scale) * __builtin_sqrtf(q.longest) * __builtin_sqrtf(k.longest) * 1.001f;
  // A single key has to weigh exactly 1, as it does where the shift is its own score.
  if (finite && a.keys > 1 && most <= kSafe) return {true, true, 0.f, exp2(broadcast(most))[0]};
  // Particles of nearly one length among themselves: none weighs more than itself, by 2^0 or nearly so.
  if (finite && a.weighting == Weighting::softmax && itself && scale > 0.f && most <= 1e5f &&
      scale * (q.longest - q.shortest) <= kSafe)
    return {true, true, scale * q.longest, 1.f};
  return {false, finite, 0.f, 1.f};
}

// -- all of it -------------------------------------------------------------------------------------------------------

template <class X, class LoopsT>
class SphereInputs {
 public:
  using WordT = typename LoopsT::WordT;
  using Element = typename Arithmetic<WordT>::Element;

  // Forward meets keys over their channels and values over themselves; backward meets everything either way.
  SphereInputs(const SphereAttendStep<X>& a, const Host& host, bool backward)
      : a_(a),
        channels_(LoopsT::padded(a.channels, a.width)),
        width_(LoopsT::padded(a.width, a.channels)),
        use_x_(a.key == nullptr || a.value == nullptr || (backward && a.query == nullptr)),
        use_query_(backward && a.query != nullptr),
        x_(host, in_place(a.x, a.width, width_), use_x_ ? a.batch : 0, a.rows, width_, true),
        query_(host, in_place(a.query, a.channels, channels_), use_query_ ? a.batch : 0, a.rows, channels_, true),
        key_(host, in_place(a.key, a.channels, channels_), a.key != nullptr ? a.batch : 0, a.keys, channels_, backward),
        value_(host, in_place(a.value, a.width, width_), a.value != nullptr ? a.batch : 0, a.keys, width_, true),
        regimes_(host, a.batch) {
    parallel(host, a.batch, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (use_x_) read(a.x, b, a.rows, a.width, width_, x_);
        if (use_query_) read(a.query, b, a.rows, a.channels, channels_, query_);
        if (a.key != nullptr) read(a.key, b, a.keys, a.channels, channels_, key_);
        if (a.value != nullptr) read(a.value, b, a.keys, a.width, width_, value_);
        regimes_[b] = regime_of(a, b, scale());
      }
    });
  }

  Particles<WordT> element(int64_t b) const {
    const Regime& regime = regimes_[b];
    Particles<WordT> p{};
    p.count_of_queries = a_.rows;
    p.count_of_keys = a_.keys;
    p.query = (a_.query != nullptr ? query_ : x_).at(b);
    p.key = (a_.key != nullptr ? key_ : x_).at(b);
    p.value = (a_.value != nullptr ? value_ : x_).at(b);
    p.scale = scale();
    p.softmax = a_.weighting == Weighting::softmax;
    p.causal = a_.causal;
    p.bounded = regime.bounded;
    p.skip = regime.finite;
    p.shift = regime.shift;
    p.largest = regime.largest;
    p.fraction = p.softmax || p.bounded ? 1.f : fraction();
    return p;
  }
  Loops<WordT> loops(const Particles<WordT>& p) const { return LoopsT::loops(channels_, p.bounded); }

  // Channels of query and key, and of value, with those that were added.
  int64_t channels() const { return channels_; }
  int64_t width() const { return width_; }
  int64_t panel_floats() const { return larger(channels_, width_) * kPanel; }

 private:
  float scale() const { return a_.beta * 1.44269504f; }
  // The largest power of two that is no more than 1 / keys.
  float fraction() const {
    float f = 1.f;
    for (int64_t n = 1; n < a_.keys; n *= 2) f *= 0.5f;
    return f;
  }
  static const Element* in_place(const X* rows, int64_t width, int64_t padded) {
    return sizeof(X) == sizeof(Element) && width == padded ? reinterpret_cast<const Element*>(rows) : nullptr;
  }
  static void read(const X* tensor, int64_t b, int64_t count, int64_t width, int64_t padded,
                   OthersBuffer<WordT>& others) {
    if (in_place(tensor, width, padded) == nullptr)
      for (int64_t i = 0; i < count; ++i) {
        const X* row = tensor + (b * count + i) * width;
        Element* out = others.rows(b) + i * padded;
        for (int64_t c = 0; c < width; c += kLanes) store_part(out + c, load_part(row + c, width - c), width - c);
        for (int64_t c = width; c < padded; ++c) out[c] = Element{};
      }
    others.write_columns(b, 0, count);
  }

  const SphereAttendStep<X>& a_;
  int64_t channels_, width_;
  bool use_x_, use_query_;
  OthersBuffer<WordT> x_, query_, key_, value_;
  Buffer<Regime> regimes_;
};

// The panels of all batch elements. Causal panels are taken from both ends in turn, so that any range of them holds as
// much work as another.
struct PanelsOf {
  int64_t of_each;
  bool causal;

  int64_t element(int64_t item) const { return item / of_each; }
  int64_t panel(int64_t item) const {
    const int64_t i = item % of_each;
    return !causal ? i : i % 2 == 0 ? i / 2 : of_each - 1 - i / 2;
  }
};

// Below this many multiply-adds waking the other threads takes longer than they save.
constexpr int64_t kWorthThreads = 1 << 17;

// work(loops, host): the loops for the call's number of channels.
template <class X, class Work>
static void with_loops(const SphereAttendStep<X>& a, const Host& given, const Work& work) {
  Host host = given;
  if (a.batch * a.rows * a.keys * (a.channels + a.width + 8) < kWorthThreads) host.threads = 1;
  if (larger(a.channels, a.width) <= SmallLoops::kChannels) work(SmallLoops{}, host);
  else work(BlockedLoops<Word<X>>{}, host);
}

}  // namespace macaron_ops::MACARON_OPS_ISA

// The gradients of sphere_attend_step, in three passes over panels of owners:
//
//   1  through the move: from dy to du, hence g and d of every row, and to the gradients in x past the attention
//   2  queries: dq, and d settled where weights are large
//   3  keys: dk and dv; or both passes at once for x among itself, where no weight is large
#pragma once

#include "sphere_inputs.h"

namespace macaron_ops::MACARON_OPS_ISA {

// A row with a larger weight than this has its d settled. Where keys are values, with a larger product of a weight and
// |u|^2: d and so its error grow with u, and the error is multiplied by u.
constexpr float kPeaked = 0.01f;

static void add_panel(const float* panel, int64_t width, float factor, float* sum) {
  for (int64_t i = 0; i < width * kPanel; i += kLanes) store(sum + i, load(sum + i) + load(panel + i) * factor);
}
template <class X>
static bool all_equal(const X* rows, int64_t count, int64_t width) {
  for (int64_t i = width; i < count * width; ++i)
    if (!(to_float(rows[i]) == to_float(rows[i - width]))) return false;
  return true;
}
static void load_owned(const float* values, int64_t count, float* lanes) {
  for (int64_t i = 0; i < kPanel; ++i) lanes[i] = i < count ? values[i] : 0.f;
}

template <class X, class LoopsT>
class SphereBackward {
 public:
  using WordT = typename LoopsT::WordT;
  using Element = typename Arithmetic<WordT>::Element;

  SphereBackward(const SphereAttendStep<X>& a, const Host& host)
      : a_(a),
        host_(host),
        inputs_(a, host, true),
        row_panels_(ceil_div(a.rows, kPanel)),
        key_panels_(ceil_div(a.keys, kPanel)),
        grad_x_(host, a.grad_x != nullptr ? a.batch * a.rows * a.width : 0),
        grad_u_(host, nullptr, a.batch, a.rows, inputs_.width(), true),
        offset_(host, a.batch * a.rows),
        panels_(host, a.batch * row_panels_),
        elements_(host, a.batch),
        mutual_(host, a.batch) {
    need_q_ = a.grad_beta != nullptr || (a.query != nullptr ? a.grad_query : a.grad_x) != nullptr;
    need_k_ = (a.key != nullptr ? a.grad_key : a.grad_x) != nullptr;
    need_v_ = (a.value != nullptr ? a.grad_value : a.grad_x) != nullptr;
  }

  void run() {
    through_the_move();
    if (!need_q_ && !need_k_ && !need_v_ && a_.grad_x == nullptr) return;
    set_elements();
    const PanelsOf rows{row_panels_, a_.causal}, all{larger(row_panels_, key_panels_), a_.causal};
    const Buffer<double> betas(host_, a_.grad_beta != nullptr ? a_.batch * (rows.of_each + all.of_each) : 0);
    each_panel(rows, betas, [](Worker& worker, int64_t b, int64_t begin) { return worker.queries(b, begin); });
    each_panel(all, a_.grad_beta != nullptr ? betas + a_.batch * rows.of_each : nullptr,
               [](Worker& worker, int64_t b, int64_t begin) { return worker.keys(b, begin); });
    if (a_.grad_beta == nullptr) return;
    double beta = 0.0;
    for (int64_t i = 0; i < a_.batch * (rows.of_each + all.of_each); ++i) beta += betas[i];
    *a_.grad_beta = float(beta);
  }

 private:
  struct PanelFacts {
    bool finite;     // g and d
    float smallest;  // total
    float longest;   // square of u
  };
  // -- 1 -------------------------------------------------------------------------------------------------------------

  void through_the_move() {
    const int64_t items = a_.batch * row_panels_;
    const StepSums steps(host_, a_.move, a_.width, items, a_.grad_step);
    parallel(host_, steps.chunks(), [&](int64_t begin, int64_t end) {
      const Buffer<float> grad_u(host_, kPanel * a_.width);
      const Buffer<double> sums(host_, steps.doubles());
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        steps.begin(sums);
        for (int64_t item = chunk * steps.kChunk; item < smaller(items, (chunk + 1) * steps.kChunk); ++item) {
          const int64_t b = item / row_panels_, first = item % row_panels_ * kPanel;
          const int64_t count = smaller<int64_t>(kPanel, a_.rows - first), at = (b * a_.rows + first) * a_.width;
          float *grad_x = a_.grad_x != nullptr ? grad_x_ + at : nullptr, *to = grad_u;
          double* step_sums = sums;
          move_rows_backward(a_.move, a_.width, count, a_.grad + at, a_.x + at, a_.saved_u + at, grad_x, to, step_sums);
          panels_[item] = divide_by_total(b, first, count, grad_u);
          grad_u_.write_columns(b, first, first + count);
        }
        steps.end(chunk, sums);
      }
    });
    steps.finish();
  }

  // The rows du to g, in the precision of its products, and d.
  PanelFacts divide_by_total(int64_t b, int64_t first, int64_t count, const float* grad_u) {
    PanelFacts facts{true, __builtin_inff(), 0.f};
    const int64_t width = inputs_.width();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = b * a_.rows + first + i;
      const float total = a_.saved_total[row];
      Element* g = grad_u_.rows(b) + (first + i) * width;
      Wide along = broadcast_wide(0.0);
      Vec square = {};
      for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t there = larger<int64_t>(a_.width - c, 0), padded = width - c;
        const Vec u = load_part(a_.saved_u + row * a_.width + c, there);
        store_part(g + c, load_part(grad_u + i * a_.width + c, there) / total, padded);
        along = along + widened(load_part(g + c, padded)) * widened(u);
        square += u * u;
      }
      const double offset = sum(along);
      offset_[row] = a_.weighting == Weighting::softmax ? float(offset) : 0.f;
      facts.finite = facts.finite && offset - offset == 0.0;
      facts.smallest = smaller(facts.smallest, total);
      facts.longest = larger(facts.longest, sum(square));
    }
    return facts;
  }

  void set_elements() {
    Worker worker(*this);
    for (int64_t b = 0; b < a_.batch; ++b) {
      const X* values = (a_.value != nullptr ? a_.value : a_.x) + b * a_.keys * a_.width;
      const bool equal_values = all_equal(values, a_.keys, a_.width);
      set_element(b, equal_values);
      if (elements_[b].softmax && a_.keys > 0) worker.offsets_of_equal_values(b, equal_values ? a_.rows : a_.causal);
    }
  }
  void set_element(int64_t b, bool equal_values) {
    Particles<WordT> p = inputs_.element(b);
    p.grad_u = grad_u_.at(b);
    p.offset = offset_ + b * a_.rows;
    p.shifts = a_.saved_shift + b * a_.rows;
    bool any_peaked = false;
    for (int64_t i = b * row_panels_; i < (b + 1) * row_panels_; ++i) {
      p.skip = p.skip && panels_[i].finite;
      any_peaked = any_peaked || peaked(p, panels_[i]);
    }
    const bool itself = a_.query == nullptr && a_.key == nullptr && a_.value == nullptr;
    elements_[b] = p;
    mutual_[b] = itself && p.bounded && !p.causal && !any_peaked && !(p.softmax && equal_values);
  }
  bool peaked(const Particles<WordT>& p, const PanelFacts& facts) const {
    const float square = keys_are_values() && a_.grad_beta == nullptr ? facts.longest : 1.f;
    return p.softmax && !(p.largest * square < kPeaked * facts.smallest);
  }
  bool keys_are_values() const { return a_.key == nullptr && a_.value == nullptr; }

  // -- 2 and 3 -------------------------------------------------------------------------------------------------------

  class Worker;

  template <class Work>
  void each_panel(const PanelsOf& panels, double* betas, const Work& work) {
    parallel(host_, a_.batch * panels.of_each, [&](int64_t begin, int64_t end) {
      Worker worker(*this);
      for (int64_t item = begin; item < end; ++item) {
        const double beta = work(worker, panels.element(item), panels.panel(item) * kPanel);
        if (a_.grad_beta != nullptr) betas[item] = beta;
      }
    });
  }

  // One thread's panels. What it returns are terms of beta's gradient.
  class Worker {
   public:
    explicit Worker(SphereBackward& all)
        : all_(all),
          a_(all.a_),
          channels_(all.inputs_.channels()),
          width_(all.inputs_.width()),
          size_(all.inputs_.panel_floats()),
          buffer_(all.host_, 3 * size_ + LoopsT::kScratch),
          owners_(all.host_, 2 * size_) {}

    // d of the first `rows` rows, which see equal values: a softmax of these is their value, whatever the scores. The
    // gradients of scores are exactly 0 where d is rounded as what it is taken from.
    void offsets_of_equal_values(int64_t b, int64_t rows) {
      const Particles<WordT>& p = all_.elements_[b];
      for (int64_t begin = 0; begin < rows; begin += kPanel) {
        const int64_t row = b * a_.rows + begin, count = smaller<int64_t>(kPanel, rows - begin);
        all_.loops(p).along(p, owners_with_gradients(begin, row, count), sum());
        std::memcpy(all_.offset_ + row, sum(), size_t(count) * sizeof(float));
      }
    }

    double queries(int64_t b, int64_t begin) {
      const Particles<WordT>& p = all_.elements_[b];
      const PanelFacts& facts = all_.panels_[b * all_.row_panels_ + begin / kPanel];
      const bool settle = p.softmax && (a_.grad_beta != nullptr || all_.peaked(p, facts));
      if (all_.mutual_[b] || !(all_.need_q_ || (settle && all_.need_k_))) return 0.0;
      const int64_t row = b * a_.rows + begin, count = smaller<int64_t>(kPanel, a_.rows - begin);
      const X* query = a_.query != nullptr ? a_.query + row * a_.channels : a_.x + row * a_.width;
      owners_panel(query, count, a_.channels, channels_, own());
      const Owners<WordT> owners = owners_with_gradients(begin, row, count);
      const bool need_second = settle && !all_.keys_are_values();
      const Sums sums{first(), second(), true, need_second, settle, nullptr, nullptr, excess_, slope_, mean_};
      all_.loops(p).queries(p, owners, sums, scratch());
      if (settle) take_off_excess(row, count);
      if (a_.query == nullptr) add_to_grad_x(first(), a_.beta, row, count);
      else write(first(), a_.beta, a_.grad_query, a_.channels, row, count);
      return slope(count);
    }

    // Writes the panel's grad_x, to which nothing is added after this.
    double keys(int64_t b, int64_t begin) {
      const Particles<WordT>& p = all_.elements_[b];
      const int64_t count = smaller<int64_t>(kPanel, a_.keys - begin), row = b * a_.keys + begin;
      double beta = 0.0;
      if (all_.mutual_[b]) {
        beta = mutual(p, begin, row, count);
      } else if (count > 0 && (all_.need_k_ || all_.need_v_)) {
        owners_panel(a_.key != nullptr ? a_.key + row * a_.channels : a_.x + row * a_.width, count, a_.channels,
                     channels_, own());
        owners_panel((a_.value != nullptr ? a_.value : a_.x) + row * a_.width, count, a_.width, width_, other());
        Owners<WordT> owners{};
        owners.begin = begin;
        owners.count = count;
        owners.own = own();
        owners.value = other();
        const Sums sums{first(), second(), all_.need_k_, all_.need_v_, false, nullptr, nullptr, nullptr, nullptr, nullptr};
        all_.loops(p).keys(p, owners, sums, scratch());
        if (a_.key == nullptr) add_to_grad_x(first(), a_.beta, row, count);
        else write(first(), a_.beta, a_.grad_key, a_.channels, row, count);
        if (a_.value == nullptr) add_to_grad_x(second(), 1.f, row, count);
        else write(second(), 1.f, a_.grad_value, a_.width, row, count);
      }
      round_grad_x(b, begin);
      return beta;
    }

   private:
    // The panels of a Worker.
    WordT* own() { return owners_; }
    WordT* other() { return owners_ + size_; }  // g of queries, v of keys
    float* first() { return buffer_; }
    float* second() { return buffer_ + size_; }
    float* sum() { return buffer_ + 2 * size_; }
    float* scratch() { return buffer_ + 3 * size_; }

    double mutual(const Particles<WordT>& p, int64_t begin, int64_t row, int64_t count) {
      owners_panel(a_.x + row * a_.width, count, a_.width, width_, own());
      const Owners<WordT> owners = owners_with_gradients(begin, row, count);
      const Sums sums{first(), second(), true, true, false, nullptr, nullptr, nullptr, slope_, nullptr};
      all_.loops(p).mutual(p, owners, sums, scratch());
      add_to_grad_x(first(), a_.beta, row, count);
      add_to_grad_x(second(), 1.f, row, count);
      // Each pair is met twice, from either side.
      return 0.5 * slope(count);
    }

    Owners<WordT> owners_with_gradients(int64_t begin, int64_t row, int64_t count) {
      owners_panel(all_.grad_u_.at(0).rows + row * width_, count, width_, width_, other());
      load_owned(all_.offset_ + row, count, offset_);
      load_owned(a_.saved_shift + row, count, shift_);
      Owners<WordT> owners{};
      owners.begin = begin;
      owners.count = count;
      owners.own = own();
      owners.grad_u = other();
      owners.offset = offset_;
      owners.shift = shift_;
      return owners;
    }

    void take_off_excess(int64_t row, int64_t count) {
      if (all_.keys_are_values()) rows_to_panel(a_.saved_u + row * a_.width, count, a_.width, a_.width, second());
      for (int64_t i = 0; i < count; ++i) {
        const float error = excess_[i] / a_.saved_total[row + i];
        all_.offset_[row + i] += error;
        slope_[i] -= error * mean_[i];
        const float times = all_.keys_are_values() ? excess_[i] : error;  // u_i, or the sum over keys
        for (int64_t c = 0; c < a_.channels; ++c) first()[c * kPanel + i] -= times * second()[c * kPanel + i];
      }
    }

    void add_to_grad_x(const float* panel, float factor, int64_t row, int64_t count) {
      if (a_.grad_x == nullptr) return;
      float* rows = all_.grad_x_ + row * a_.width;
      rows_to_panel(rows, count, a_.width, a_.width, sum());
      add_panel(panel, a_.width, factor, sum());
      rows_of_panel(sum(), count, a_.width, rows);
    }
    void write(const float* panel, float factor, X* grad, int64_t width, int64_t row, int64_t count) {
      if (grad == nullptr) return;
      for (int64_t i = 0; i < width * kPanel; i += kLanes) store(sum() + i, load(panel + i) * factor);
      rows_of_panel(sum(), count, width, grad + row * width);
    }
    void round_grad_x(int64_t b, int64_t begin) {
      if (a_.grad_x == nullptr || begin >= a_.rows) return;
      const int64_t first = (b * a_.rows + begin) * a_.width;
      const int64_t count = smaller<int64_t>(kPanel, a_.rows - begin) * a_.width;
      for (int64_t i = 0; i < count; i += kLanes)
        store_part(a_.grad_x + first + i, load_part(all_.grad_x_ + first + i, count - i), count - i);
    }

    double slope(int64_t count) const {
      double total = 0.0;
      for (int64_t i = 0; i < count; ++i) total += double(slope_[i]);
      return total;
    }

    SphereBackward& all_;
    const SphereAttendStep<X>& a_;
    int64_t channels_, width_, size_;
    Buffer<float> buffer_;
    Buffer<WordT> owners_;
    float offset_[kPanel], shift_[kPanel], excess_[kPanel], slope_[kPanel], mean_[kPanel];
  };

  Loops<WordT> loops(const Particles<WordT>& p) const { return inputs_.loops(p); }

  const SphereAttendStep<X>& a_;
  const Host& host_;
  const SphereInputs<X, LoopsT> inputs_;
  int64_t row_panels_, key_panels_;
  Buffer<float> grad_x_;       // (batch, rows, width)
  OthersBuffer<WordT> grad_u_;  // g_i
  Buffer<float> offset_;       // d_i
  Buffer<PanelFacts> panels_;
  Buffer<Particles<WordT>> elements_;
  Buffer<bool> mutual_;  // by element: pass 3 does 2 as well
  bool need_q_, need_k_, need_v_;
};

}  // namespace macaron_ops::MACARON_OPS_ISA

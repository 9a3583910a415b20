// The library as torch sees it: one pair of operators for any list of substeps.
//
//   forward(inputs, plan) -> y, and for each substep its input (unless it is inputs[0], or that of the substep before
//       it), then what its operator saves. Nothing but y where no substep saves.
//   backward(grad, inputs, kept, needs, plan) -> one gradient per input, empty where needs says 0
//
// A plan is, for each substep: operator, joins, save, number of tensors, for each of them its place among the inputs or
// -1, number of options, the options. A substep that joins reads the input of the one before it, and adds to its output.
#include <torch/csrc/stable/library.h>

#include "kernels.h"
#include "operators.h"
#include "scratch.h"

namespace macaron_ops {
namespace {

struct Substep {
  const Operator* op;
  bool joins;
  Save save;
  std::vector<int64_t> slots;
  std::vector<double> options;

  Call call(const Tensor& x, const Tensors& inputs) const {
    std::vector<MaybeTensor> tensors;
    for (int64_t slot : slots) tensors.push_back(slot < 0 ? MaybeTensor() : MaybeTensor(inputs.at(size_t(slot))));
    return Call(x, std::move(tensors), options, save);
  }
};

std::vector<Substep> decode(const std::vector<double>& plan) {
  std::vector<Substep> substeps;
  size_t at = 0;
  auto next = [&] { return plan.at(at++); };
  while (at < plan.size()) {
    Substep s;
    s.op = &operator_of(int64_t(next()));
    s.joins = next() != 0.0;
    s.save = Save(int(next()));
    for (size_t n = size_t(next()); n > 0; --n) s.slots.push_back(int64_t(next()));
    for (size_t n = size_t(next()); n > 0; --n) s.options.push_back(next());
    substeps.push_back(std::move(s));
  }
  return substeps;
}

// a + b of tensors of one dtype and shape.
Tensor add(const Tensor& a, const Tensor& b) {
  return torch::stable::subtract(a, b, -1.0);
}

// Whether the backward pass reads the input of substep i, which those after it that join it read too.
bool is_kept(const std::vector<Substep>& substeps, size_t i) {
  bool kept = substeps[i].save != Save::none;
  for (size_t j = i + 1; j < substeps.size() && substeps[j].joins; ++j) kept = kept || substeps[j].save != Save::none;
  return kept;
}

Tensors forward(Tensors inputs, std::vector<double> plan) {
  const std::vector<Substep> substeps = decode(plan);
  bool keeps = false;
  for (const Substep& s : substeps) keeps = keeps || s.save != Save::none;
  Tensors kept(1, inputs.at(0));
  Tensor x = inputs[0], y = inputs[0];
  for (size_t i = 0; i < substeps.size(); ++i) {
    const Substep& s = substeps[i];
    if (!s.joins) {
      x = y;
      if (i > 0 && keeps) kept.push_back(is_kept(substeps, i) ? x : nothing(x.scalar_type()));
    }
    Call call = s.call(x, inputs);
    Tensors out = s.op->forward(call);
    if (keeps) kept.insert(kept.end(), out.begin() + 1, out.end());
    y = s.joins ? add(y, out[0]) : out[0];
  }
  kept[0] = y;
  return kept;
}

Tensors backward(Tensor grad, Tensors inputs, Tensors kept, std::vector<int64_t> needs, std::vector<double> plan) {
  const std::vector<Substep> substeps = decode(plan);
  struct Read {
    Tensor x;
    bool need_x;
    size_t saved;
  };
  std::vector<Read> reads;
  size_t at = 0;
  Tensor x = inputs.at(0);
  bool need_x = needs.at(0) != 0, need_y = need_x;
  for (size_t i = 0; i < substeps.size(); ++i) {
    if (!substeps[i].joins) {
      need_x = need_y;
      if (i > 0) x = kept.at(at++);
    }
    reads.push_back({x, need_x, at});
    for (int64_t slot : substeps[i].slots) need_y = need_y || (slot >= 0 && needs.at(size_t(slot)) != 0);
    at += substeps[i].op->saved;
  }
  STD_TORCH_CHECK(at == kept.size(), "kept: expected ", at, " tensors, got ", kept.size());

  std::vector<MaybeTensor> grads(inputs.size());
  auto accumulate = [](MaybeTensor& sum, const Tensor& term) { sum = sum.has_value() ? add(*sum, term) : term; };
  grad = grad.is_contiguous() ? grad : torch::stable::contiguous(grad);
  MaybeTensor flowing = grad, grad_input;  // of a substep's output, and of the tensor that it and those joining it read
  for (size_t i = substeps.size(); i-- > 0;) {
    const Substep& s = substeps[i];
    const Read& read = reads[i];
    std::vector<bool> need(1, read.need_x);
    bool any = read.need_x;
    for (int64_t slot : s.slots) {
      need.push_back(slot >= 0 && needs[size_t(slot)] != 0);
      any = any || need.back();
    }
    if (any) {
      Call call = s.call(read.x, inputs);
      Gradients gradients(call, need);
      // Without tokens every gradient is zero, and kernels need not think of it.
      const Tensors results = call.x.numel() == 0
                                  ? gradients.zeros()
                                  : s.op->backward(call, *flowing, gradients, kept.data() + read.saved);
      if (read.need_x) accumulate(grad_input, results[0]);
      for (size_t t = 0; t < s.slots.size(); ++t)
        if (need[t + 1]) accumulate(grads[size_t(s.slots[t])], results[t + 1]);
    }
    if (!s.joins) {
      flowing = grad_input;
      grad_input.reset();
      if (!read.need_x) break;  // nothing before this substep is differentiated
    }
  }
  if (needs[0] != 0) accumulate(grads[0], *flowing);
  Tensors out;
  for (const MaybeTensor& g : grads) out.push_back(g.has_value() ? *g : nothing(ScalarType::Float));
  return out;
}

}  // namespace

const Operator& operator_of(int64_t number) {
  static const Operator* const operators[] = {&ffn_step, &attend_step, &normalize_step, &sphere_attend_step};
  STD_TORCH_CHECK(number >= 0 && number < int64_t(std::size(operators)), "plan: no operator has the number ", number);
  return *operators[number];
}

STABLE_TORCH_LIBRARY(macaron_ops_cpu, m) {
  m.def("forward(Tensor[] inputs, float[] plan) -> Tensor[]");
  m.def("backward(Tensor grad, Tensor[] inputs, Tensor[] kept, int[] needs, float[] plan) -> Tensor[]");
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def("scratch_peak() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(macaron_ops_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(macaron_ops_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa_in_use));
  m.impl("isas", TORCH_BOX(&isas_here));
  m.impl("scratch_peak", TORCH_BOX(&scratch_peak));
}

}  // namespace macaron_ops

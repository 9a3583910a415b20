// The operators on tensors: one file each, a table by their number in a plan.
#pragma once

#include "call.h"

namespace macaron_ops {

struct Operator {
  const char* name;
  size_t saved;  // how many tensors its forward saves
  Tensors (*forward)(Call&);                                          // y, what is saved
  Tensors (*backward)(Call&, const Tensor& grad, Gradients&, const Tensor* saved);  // gradients.finish()
};

extern const Operator ffn_step, attend_step, normalize_step, sphere_attend_step;

// In the order of OPERATORS of macaron_ops/ops/dispatch.py.
const Operator& operator_of(int64_t number);

}  // namespace macaron_ops

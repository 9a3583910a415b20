// What normalize_step and sphere_attend_step have in common.
#pragma once

#include "call.h"

namespace macaron_ops {

// The step: the number among the options or, where the field is there, a tensor of shape () or (width,).
inline void set_step(Move& move, Call& call, float number, size_t field) {
  const float* learned = call.floats(field);
  const bool per_channel = learned != nullptr && call.tensors.at(field)->dim() > 0;
  move.step = learned != nullptr && !per_channel ? *learned : number;
  move.channel_step = per_channel ? learned : nullptr;
}

// Calls function(X{}) for the dtype of x.
template <class Function>
auto with_dtype(ScalarType x, const Function& function) {
  STD_TORCH_CHECK(x == ScalarType::Float || x == ScalarType::BFloat16, "x: expected float32 or bfloat16");
  return x == ScalarType::Float ? function(float{}) : function(bf16{});
}

}  // namespace macaron_ops

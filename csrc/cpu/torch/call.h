// A substep as the operators' torch side gets it: tensors, options as numbers, and what to keep.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <deque>
#include <optional>
#include <vector>

#include "cpu/operators.h"

namespace macaron_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

enum class Save : int { none, lean, fast };

template <class T>
constexpr ScalarType kDtype = ScalarType::Float;
template <>
inline constexpr ScalarType kDtype<bf16> = ScalarType::BFloat16;

Host torch_host();  // torch's threads

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype);
inline Tensor nothing(ScalarType dtype) { return empty({0}, dtype); }
std::vector<int64_t> shape_of(const Tensor& t);

// A call of one operator. Keeps alive what its pointers point to.
class Call {
 public:
  Call(Tensor x, std::vector<MaybeTensor> tensors, std::vector<double> options, Save save);

  Tensor x;  // contiguous
  std::vector<MaybeTensor> tensors;  // the fields of the reference's `Tensors`, in order
  Save save;

  // The options in order, each read once.
  double number() { return options_.at(next_++); }
  float real() { return float(number()); }
  int64_t whole() { return int64_t(number()); }
  template <class Enum>
  Enum choice() { return Enum(int(number())); }
  bool flag() { return number() != 0.0; }

  bool has(size_t field) const { return tensors.at(field).has_value(); }
  int64_t size(size_t field, int64_t dim) const { return tensors.at(field)->size(dim); }
  // A tensor's elements, contiguous; null where it is absent.
  template <class T>
  const T* data(size_t field) { return static_cast<const T*>(contiguous_data(field)); }
  // A vector parameter in float, whatever its dtype; null where it is absent.
  const float* floats(size_t field);
  uint64_t seed(size_t field) const;
  Dropout dropout(double p, size_t seed_field, int64_t stream) const { return {p, has(seed_field) ? seed(seed_field) : 0, stream}; }

  int64_t rows() const { return width() == 0 ? 0 : x.numel() / width(); }
  int64_t width() const { return x.size(x.dim() - 1); }

 private:
  const void* contiguous_data(size_t field);

  std::vector<double> options_;
  size_t next_ = 0;
  std::deque<Tensor> kept_;
  std::deque<std::vector<float>> floats_;
};

// The gradients of a call: index 0 is x's, i + 1 that of tensors[i]; an empty tensor where not needed.
class Gradients {
 public:
  Gradients(const Call& call, const std::vector<bool>& needs);

  // Where a kernel writes a gradient in the tensor's own dtype; null where it is not needed.
  template <class T>
  T* data(size_t index) {
    return needs_.at(index) ? static_cast<T*>(allocate(index).mutable_data_ptr()) : nullptr;
  }
  // The same for one that kernels write in float: rounded by finish().
  float* floats(size_t index);
  bool need(size_t index) const { return needs_.at(index); }

  Tensors finish();
  Tensors zeros();

 private:
  Tensor& allocate(size_t index);

  const Call& call_;
  std::vector<bool> needs_;
  Tensors grads_;
  std::deque<std::pair<size_t, std::vector<float>>> rounded_;
};

// (x, weights) dtypes: calls function(X{}, W{}).
template <class Function>
auto with_dtypes(ScalarType x, ScalarType weights, const Function& function) {
  const bool narrow_x = x == ScalarType::BFloat16, narrow = weights == ScalarType::BFloat16;
  STD_TORCH_CHECK((x == ScalarType::Float || narrow_x) && (weights == ScalarType::Float || narrow) && narrow_x <= narrow,
                  "x, weights: expected float32 or bfloat16, weights no wider than x");
  if (narrow_x) return function(bf16{}, bf16{});
  return narrow ? function(float{}, bf16{}) : function(float{}, float{});
}

}  // namespace macaron_ops

// What the operators' torch side shares: tensors of LibTorch's stable ABI, the device that they lie on, and its stream.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "cuda/operators.h"

#ifndef MACARON_OPS_CUDA_ON_HOST
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>
// Declared weak, it is null where torch has no CUDA, and the library loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#define MACARON_DISPATCH_KEY CUDA
#else
#define MACARON_DISPATCH_KEY CPU
#endif

namespace macaron_ops::cuda {

using torch::headeronly::ScalarType;
using torch::stable::empty_like;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// While it lives, launches go to the tensor's device; `stream` is torch's current one there.
class OnDevice {
 public:
#ifdef MACARON_OPS_CUDA_ON_HOST
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
#endif
  void* stream = nullptr;

#ifndef MACARON_OPS_CUDA_ON_HOST
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// Contiguous, from a multiple of 16 bytes on, as what torch allocates: a slice may begin elsewhere.
inline Tensor dense(const Tensor& t) {
  if (!t.is_contiguous()) return torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}
inline Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}
inline Tensor in_float(const Tensor& t) { return dense(in_dtype(t, ScalarType::Float)); }

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape(static_cast<size_t>(t.dim()));
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = t.size(int64_t(i));
  return shape;
}
inline Tensor empty(const Tensor& beside, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(beside, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
}
inline Tensor nothing(const Tensor& beside, ScalarType dtype) { return empty(beside, {0}, dtype); }

template <class T = void>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T = void>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
// A gradient like `t`: nothing, and null, where it is not needed.
struct Gradient {
  Tensor tensor;
  void* data;
  Gradient(const Tensor& t, bool needed)
      : tensor(needed ? empty_like(t) : nothing(t, t.scalar_type())), data(needed ? write(tensor) : nullptr) {}
};

inline int64_t width_of(const Tensor& t) { return t.size(t.dim() - 1); }
inline int64_t rows_of(const Tensor& t) { return width_of(t) == 0 ? 0 : t.numel() / width_of(t); }

// The sum over dimension 0 of (blocks, n), as a tensor of the shape and dtype of `like`.
inline Tensor sum_of_blocks(const Tensor& partial, const Tensor& like) {
  const int64_t first = 0;
  Tensor sum = torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1));
  const std::vector<int64_t> shape = shape_of(like);
  sum = torch::stable::reshape(sum, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  return in_dtype(sum, like.scalar_type());
}
inline Tensor zeros_like(const Tensor& t) {
  Tensor zeros = empty_like(t);
  torch::stable::zero_(zeros);
  return zeros;
}

// A parameter's elements in float, kept alive by `held`; null where it is absent.
inline const float* vector_of(const MaybeTensor& t, MaybeTensor& held) {
  if (!t.has_value()) return nullptr;
  held = in_float(*t);
  return read<float>(*held);
}

// A step whose tensor, in float, is kept alive by `held`.
inline Step step_of(const MaybeTensor& tensor, double number, int64_t direction, double eps, MaybeTensor& held) {
  Step step{float(number), nullptr, false, Direction(direction), float(eps)};
  if (tensor.has_value()) {
    held = in_float(*tensor);
    step.tensor = read<float>(*held);
    step.per_channel = tensor->dim() > 0;
  }
  return step;
}

}  // namespace macaron_ops::cuda

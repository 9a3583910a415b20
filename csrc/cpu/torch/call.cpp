#include "call.h"

#include <cstring>

#include "scratch.h"

namespace macaron_ops {

namespace {

float widened(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

bf16 rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fc0};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

void run_parallel(int64_t count, void (*body)(const void*, int64_t, int64_t), const void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace

Host torch_host() { return {int64_t(torch::stable::get_num_threads()), run_parallel, allocate_scratch, release_scratch}; }

Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
}

std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape(size_t(t.dim()));
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = t.size(int64_t(i));
  return shape;
}

Call::Call(Tensor x, std::vector<MaybeTensor> tensors, std::vector<double> options, Save save)
    : x(as_contiguous(x)), tensors(std::move(tensors)), save(save), options_(std::move(options)) {}

const void* Call::contiguous_data(size_t field) {
  if (!has(field)) return nullptr;
  return kept_.emplace_back(as_contiguous(*tensors[field])).const_data_ptr();
}

const float* Call::floats(size_t field) {
  if (!has(field)) return nullptr;
  const void* data = contiguous_data(field);
  if (tensors[field]->scalar_type() == ScalarType::Float) return static_cast<const float*>(data);
  STD_TORCH_CHECK(tensors[field]->scalar_type() == ScalarType::BFloat16, "expected float32 or bfloat16 parameters");
  const bf16* narrow = static_cast<const bf16*>(data);
  std::vector<float>& wide = floats_.emplace_back(size_t(tensors[field]->numel()));
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = widened(narrow[i]);
  return wide.data();
}

uint64_t Call::seed(size_t field) const { return *static_cast<const uint64_t*>(tensors[field]->const_data_ptr()); }

Gradients::Gradients(const Call& call, const std::vector<bool>& needs)
    : call_(call), needs_(needs), grads_(needs.size(), nothing(call.x.scalar_type())) {}

Tensor& Gradients::allocate(size_t index) {
  const Tensor& like = index == 0 ? call_.x : *call_.tensors.at(index - 1);
  grads_[index] = empty(shape_of(like), like.scalar_type());
  return grads_[index];
}

float* Gradients::floats(size_t index) {
  if (!needs_.at(index)) return nullptr;
  Tensor& grad = allocate(index);
  if (grad.scalar_type() == ScalarType::Float) return static_cast<float*>(grad.mutable_data_ptr());
  return rounded_.emplace_back(index, std::vector<float>(size_t(grad.numel()))).second.data();
}

Tensors Gradients::zeros() {
  for (size_t i = 0; i < needs_.size(); ++i)
    if (needs_[i]) torch::stable::zero_(allocate(i));
  return std::move(grads_);
}

Tensors Gradients::finish() {
  for (const auto& [index, wide] : rounded_) {
    bf16* out = static_cast<bf16*>(grads_[index].mutable_data_ptr());
    for (size_t i = 0; i < wide.size(); ++i) out[i] = rounded(wide[i]);
  }
  return std::move(grads_);
}

}  // namespace macaron_ops

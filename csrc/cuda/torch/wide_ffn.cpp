// The products of a wide ffn_step on tensors: csrc/cuda/sm90/product.h says what they are, macaron_ops/native/cuda/wide_ffn.py
// puts them together. Left out of a library for other GPUs, or built without CUTLASS: MACARON_OPS_WITHOUT_SM90 says why.
#include <limits>
#include <string>
#include <tuple>

#include "tensors.h"

#ifndef MACARON_OPS_WITHOUT_SM90
#define MACARON_OPS_WITHOUT_SM90 ""
#define MACARON_OPS_SM90
#include "cuda/sm90/product.h"
#endif

namespace macaron_ops::cuda {
namespace {

std::string without_sm90() { return MACARON_OPS_WITHOUT_SM90; }

#ifdef MACARON_OPS_SM90
using sm90::kTiles;
using sm90::kVariants;
using sm90::Product;

// left (rows, depth) and a right operand that gives so many columns, both dense.
Product product(const Tensor& left, const Tensor& right, int64_t columns, int64_t activation, int64_t variant,
                int64_t swizzle) {
  STD_TORCH_CHECK(left.size(0) <= std::numeric_limits<int>::max(), "expected at most 2^31 - 1 rows");
  STD_TORCH_CHECK(variant >= 0 && variant < kVariants, "expected a variant of 0 to ", kVariants - 1, ", got ", variant);
  Product p{};
  p.dtype = dtype_of(left);
  p.rows = int(left.size(0));
  p.columns = int(columns);
  p.depth = int(left.size(1));
  p.left = read(left);
  p.right = read(right);
  p.activation = Activation(activation);
  p.variant = int(variant);
  p.swizzle = int(swizzle);
  return p;
}

bool bf16(const Product& p) { return p.dtype == Dtype::bfloat16; }

// A vector in the dtype of the operands, kept alive by `held`; null where it is absent.
const void* bias_of(const MaybeTensor& bias, const Tensor& beside, MaybeTensor& held) {
  if (!bias.has_value()) return nullptr;
  held = dense(in_dtype(*bias, beside.scalar_type()));
  return read(*held);
}

std::tuple<Tensor, Tensor> hidden(Tensor n, Tensor w_in, MaybeTensor b_in, int64_t activation, bool keep, int64_t variant,
                                  int64_t swizzle) {
  const OnDevice device(n);
  n = dense(n);
  w_in = dense(w_in);
  MaybeTensor held;
  Product p = product(n, w_in, w_in.size(0), activation, variant, swizzle);
  p.bias = bias_of(b_in, n, held);
  const Tensor h = empty(n, {p.rows, p.columns}, n.scalar_type());
  const Tensor z = keep ? empty_like(h) : nothing(n, n.scalar_type());
  p.out = write(h);
  p.kept = keep ? write(z) : nullptr;
  if (p.rows > 0) (bf16(p) ? sm90::hidden_bf16 : sm90::hidden_fp16)(p, device.stream);
  return {h, z};
}

Tensor residual(Tensor h, Tensor w_out, MaybeTensor b_out, Tensor x, double a, double c, int64_t variant, int64_t swizzle) {
  const OnDevice device(h);
  h = dense(h);
  w_out = dense(w_out);
  x = dense(x);
  MaybeTensor held;
  Product p = product(h, w_out, w_out.size(0), 0, variant, swizzle);
  p.bias = bias_of(b_out, h, held);
  p.source = read(x);
  p.a = float(a);
  p.c = float(c);
  const Tensor y = empty_like(x);
  p.out = write(y);
  if (p.rows > 0) (bf16(p) ? sm90::residual_bf16 : sm90::residual_fp16)(p, device.stream);
  return y;
}

// The gradient of z, h again, and the gradient's sums over the rows of each tile, (tiles of rows, at least F).
std::tuple<Tensor, Tensor, Tensor> hidden_backward(Tensor grad, Tensor w_out, Tensor z, int64_t activation, double c,
                                                   bool need_h, bool need_sums, int64_t variant, int64_t swizzle) {
  const OnDevice device(grad);
  grad = dense(grad);
  w_out = dense(w_out);
  z = dense(z);
  Product p = product(grad, w_out, w_out.size(1), activation, variant, swizzle);
  p.source = read(z);
  p.c = float(c);
  const Tensor dz = empty_like(z), h = need_h ? empty_like(z) : nothing(z, z.scalar_type());
  p.out = write(dz);
  p.kept = need_h ? write(h) : nullptr;
  const sm90::Tile tile = kTiles[variant];
  const auto whole = [](int64_t length, int64_t part) { return (length + part - 1) / part; };
  const int64_t across = whole(p.columns, tile.columns) * tile.columns;
  const Tensor sums = empty(z, {need_sums ? whole(p.rows, tile.rows) : 0, across}, ScalarType::Float);
  p.sums = need_sums ? write<float>(sums) : nullptr;
  if (p.rows > 0) (bf16(p) ? sm90::backward_bf16 : sm90::backward_fp16)(p, device.stream);
  return {dz, h, sums};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(macaron_ops_cuda, m) {
  m.def("without_sm90() -> str");
#ifdef MACARON_OPS_SM90
  m.def(
      "ffn_hidden(Tensor n, Tensor w_in, Tensor? b_in, int activation, bool keep, int variant, int swizzle)"
      " -> (Tensor, Tensor)");
  m.def(
      "ffn_residual(Tensor h, Tensor w_out, Tensor? b_out, Tensor x, float a, float c, int variant, int swizzle)"
      " -> Tensor");
  m.def(
      "ffn_hidden_backward(Tensor grad, Tensor w_out, Tensor z, int activation, float c, bool need_h, bool need_sums,"
      " int variant, int swizzle) -> (Tensor, Tensor, Tensor)");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(macaron_ops_cuda, CompositeExplicitAutograd, m) {
  m.impl("without_sm90", TORCH_BOX(&without_sm90));
}

#ifdef MACARON_OPS_SM90
STABLE_TORCH_LIBRARY_IMPL(macaron_ops_cuda, MACARON_DISPATCH_KEY, m) {
  m.impl("ffn_hidden", TORCH_BOX(&hidden));
  m.impl("ffn_residual", TORCH_BOX(&residual));
  m.impl("ffn_hidden_backward", TORCH_BOX(&hidden_backward));
}
#endif

}  // namespace macaron_ops::cuda

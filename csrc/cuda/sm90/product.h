// The products of a wide FFN step on sm_90a: what one is, without a header of CUTLASS.
//
//   hidden     out = act(L R^T + bias), kept = L R^T + bias            L = N(x), R = W_in (F, D)
//   residual   out = a source + c (L R^T + bias)                       L = h, R = W_out (D, F)
//   backward   out = c (L R) act'(source), kept = act(source),         L = dy, R = W_out (D, F), source = the kept
//              sums = the sums of out over each tile's rows            pre-activations, relu's their act
#pragma once

#include "../operators.h"

namespace macaron_ops::cuda::sm90 {

struct Product {
  Dtype dtype;  // 16 bits
  int rows, columns, depth;  // of out, and the length of the sums; columns and depth multiples of 8
  const void *left, *right;  // (rows, depth); (columns, depth), or (depth, columns) in `backward`
  const void* bias;          // (columns,), null: none
  const void* source;        // (rows, columns)
  void *out, *kept;          // (rows, columns); kept null: not wanted
  float* sums;               // (tiles of rows, columns of whole tiles), null: not wanted
  Activation activation;
  float a, c;
  int variant, swizzle;  // which of the tiles below; tiles that neighbours take one after the other
};

// Tiles of out, and who computes them. Pingpong: two groups of warps have a tile each, and one's epilogue goes on beside
// the other's products. Cooperative: both have halves of one tile, whose operands are then read less often.
struct Tile {
  int rows, columns;
};
constexpr Tile kTiles[] = {
    {128, 128},  // 0: pingpong
    {128, 256},  // 1: cooperative
    {256, 128},  // 2: cooperative
    {64, 128},   // 3: pingpong, for few rows
};
constexpr int kVariants = sizeof(kTiles) / sizeof(Tile);

// One source for each product and dtype: they take a minute or two to compile.
void hidden_bf16(const Product&, void* stream);
void hidden_fp16(const Product&, void* stream);
void residual_bf16(const Product&, void* stream);
void residual_fp16(const Product&, void* stream);
void backward_bf16(const Product&, void* stream);
void backward_fp16(const Product&, void* stream);

}  // namespace macaron_ops::cuda::sm90

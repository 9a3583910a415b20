// Types that kernels and their callers share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace macaron_ops {

struct bf16 {
  uint16_t bits;
};

template <size_t... i>
struct IndexSequence {};

template <size_t n, size_t... i>
struct MakeIndexSequenceOf : MakeIndexSequenceOf<n - 1, n - 1, i...> {};
template <size_t... i>
struct MakeIndexSequenceOf<0, i...> {
  using Type = IndexSequence<i...>;
};
template <size_t n>
using MakeIndexSequence = typename MakeIndexSequenceOf<n>::Type;

}  // namespace macaron_ops

// The epilogues of product.h as visitor trees: each node gets its children's fragments of the tile, in float32.
// What they compute is in elements.h.
#pragma once

#include "elements.h"
#include "gemm.h"

namespace macaron_ops::cuda::sm90 {

namespace fusion = cutlass::epilogue::fusion;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

template <class T, class V>
using Bias = fusion::Sm90RowBroadcast<0, typename V::TileShape, T, float>;  // zeros where there is none

// A second tensor that is written through shared memory by TMA, like out; nothing where it is null.
template <class T, class V, class Source>
struct Kept {
  using Description = cutlass::epilogue::collective::detail::EpilogueDescriptor<
      typename V::TileShape, cutlass::epilogue::collective::EpilogueTileAuto, Source, T, typename V::Epilogue>;
  using Store = cutlass::epilogue::collective::detail::AuxStoreDescriptor<Description, RowMajor, T>;
  using Node = fusion::Sm90AuxStore<Store::Stages, typename Description::EpilogueTile, T, kRound, typename Store::Stride,
                                    typename Store::SmemLayoutAtom, typename Store::CopyOpR2S>;
  static typename Node::Arguments arguments(const Product& p) {
    return {static_cast<T*>(p.kept), cute::make_stride(int64_t{p.columns}, cute::_1{}, int64_t{0})};
  }
};

// -- hidden ----------------------------------------------------------------------------------------------------------

template <class T, class V>
struct Hidden {
  using Source = void;
  static constexpr bool kRightAlongDepth = true;
  using Sum = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, float, float, kRound>, fusion::Sm90AccFetch, Bias<T, V>>;
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<Activate, T, float, kRound>,
                               fusion::Sm90EVT<typename Kept<T, V, void>::Node, Sum>>;
  static typename Tree::Arguments arguments(const Product& p) {
    return {{{{}, {static_cast<const T*>(p.bias)}, {}}, Kept<T, V, void>::arguments(p)}, {p.activation}};
  }
};

// -- residual --------------------------------------------------------------------------------------------------------

template <class T, class V>
struct WithResidual {
  using Source = T;
  static constexpr bool kRightAlongDepth = true;
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<Residual, T, float, kRound>, fusion::Sm90AccFetch, Bias<T, V>,
                               fusion::Sm90SrcFetch<T>>;
  static typename Tree::Arguments arguments(const Product& p) {
    return {{}, {static_cast<const T*>(p.bias)}, {}, {p.a, p.c}};
  }
};

// -- backward --------------------------------------------------------------------------------------------------------

// From the sums and z: the gradient of z, which goes on, and act(z), which is kept. One exponential serves both.
template <class T, class V>
struct Differentiate : Kept<T, V, T>::Node {
  using Base = typename Kept<T, V, T>::Node;
  struct Arguments {
    typename Base::Arguments kept = {};
    Activation activation = Activation::relu;
    float c = 1.f;
  };
  struct Params {
    typename Base::Params kept;
    Activation activation;
    float c;
  };
  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem& problem, const Arguments& a, void* workspace) {
    return {Base::to_underlying_arguments(problem, a.kept, workspace), a.activation, a.c};
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  const Params* params = nullptr;
  CUTLASS_HOST_DEVICE Differentiate() {}
  CUTLASS_HOST_DEVICE Differentiate(const Params& params_, const typename Base::SharedStorage& shared)
      : Base(params_.kept, shared), params(&params_) {}

  template <class BaseCallbacks>
  struct Callbacks : BaseCallbacks {
    Activation activation;
    float c;
    CUTLASS_DEVICE Callbacks(BaseCallbacks&& base, const Params& params)
        : BaseCallbacks(cute::move(base)), activation(params.activation), c(params.c) {}

    template <class Sums, class Z, int N>
    CUTLASS_DEVICE cutlass::Array<float, N> visit(const cutlass::Array<Sums, N>& sums, int v, int, int,
                                                  const cutlass::Array<Z, N>& z) {
      cutlass::Array<float, N> h, dz;
      differentiate<N>(activation, c, sums, z, h, dz);
      cute::recast<cutlass::Array<T, N>>(cute::coalesce(this->tC_rAux))(v) =
          cutlass::NumericArrayConverter<T, float, N, kRound>{}(h);
      return dz;
    }
  };

  template <bool kReferenceSource, class... Rest>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Rest...>& args) {
    auto base = Base::template get_consumer_store_callbacks<kReferenceSource>(args);
    return Callbacks<decltype(base)>(cute::move(base), *params);
  }
};

// The sums of a tile's columns, (tiles of rows, columns of whole tiles). CUTLASS's node, whose own way over the lanes
// takes its sums to local memory.
template <class V>
struct ColumnSums
    : fusion::Sm90RowReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, typename V::TileShape, float, float, kRound,
                               cute::Stride<cute::_0, cute::_1, cute::_0>, 4, /*EnableNullptr=*/true,
                               // Rows past the last are zeros of both operands' copies: they may be added.
                               /*FinalReduction=*/false, /*VisitCheckOOB=*/false> {
  using Base =
      fusion::Sm90RowReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, typename V::TileShape, float, float, kRound,
                               cute::Stride<cute::_0, cute::_1, cute::_0>, 4, true, false, false>;
  using Base::Base;

  template <class BaseCallbacks>
  struct Callbacks : BaseCallbacks {
    CUTLASS_DEVICE explicit Callbacks(BaseCallbacks&& base) : BaseCallbacks(cute::move(base)) {}

    template <class Shared, class Synchronise, class Results>
    CUTLASS_DEVICE void reduce(Shared&& shared, const Synchronise& synchronise, int, int, bool last, Results) {
      if (!last || this->params.ptr_row == nullptr) return;
      auto& [by_source, sums, at, row, first, all, shared_layout, lane_layout, lane, warp_layout, warp, tile, rest, rest_at,
             epilogue_tile, tiled_copy, thread] = this->args_tuple;
      if (!cute::elem_less(first(cute::_0{}, cute::_0{}), rest)) return;  // of a cluster that goes past the edge
      constexpr int kWarps = decltype(cute::size<0>(warp_layout))::value, kColumns = cute::size<1>(typename V::TileShape{});
      constexpr int kMine = decltype(cute::size(cute::filter(sums)))::value;
      static_assert(decltype(cute::size<0>(lane_layout))::value == 8 && decltype(lane_layout(cute::_1{}, cute::_0{}))::value == 4);
      float part[kMine], found[kMine / 8];
#pragma unroll
      for (int i = 0; i < kMine; ++i) part[i] = cute::filter(sums)(i);
      add_lanes<8>(part, found, cute::get<0>(lane));

      auto by_warp = cute::make_tensor(cute::make_smem_ptr<float>(cute::raw_pointer_cast(shared.data())), shared_layout);
      static_assert(decltype(cute::cosize(by_warp.layout()))::value * sizeof(float) <=
                    decltype(cute::cosize(shared.layout()))::value * sizeof(typename cute::remove_cvref_t<Shared>::value_type));
      auto mine = cute::logical_divide(
          cute::filter(fusion::sm90_partition_for_epilogue<decltype(by_source)::value>(
              by_warp(cute::_, cute::_, cute::get<0>(warp)), epilogue_tile, tiled_copy, thread)),
          cute::Int<kMine / 8>{});
      synchronise();
#pragma unroll
      for (int i = 0; i < kMine / 8; ++i) mine(i, cute::get<0>(lane)) = found[i];
      synchronise();
      for (int column = thread; column < kColumns; column += cute::size(tiled_copy)) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += by_warp(cute::_0{}, column, w);
        all(cute::_0{}, column, cute::get<0>(tile), cute::get<3>(tile)) = sum;
      }
      synchronise();
    }
  };

  template <bool kReferenceSource, class... Rest>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Rest...>& args) {
    auto base = Base::template get_consumer_store_callbacks<kReferenceSource>(args);
    return Callbacks<decltype(base)>(cute::move(base));
  }
};

template <class T, class V>
struct Backward {
  using Source = T;
  static constexpr bool kRightAlongDepth = false;
  using Gradient = fusion::Sm90EVT<Differentiate<T, V>, fusion::Sm90SrcFetch<T>>;
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::Identity, T, float, kRound>,
                               fusion::Sm90EVT<ColumnSums<V>, Gradient>>;
  static typename Tree::Arguments arguments(const Product& p) {
    return {{{{}, {Kept<T, V, T>::arguments(p), p.activation, p.c}}, {p.sums}}, {}};
  }
};

}  // namespace macaron_ops::cuda::sm90

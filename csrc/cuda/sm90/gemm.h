// A product by CUTLASS: TMA brings tiles of the operands through shared memory, wgmma multiplies them, and an epilogue
// visitor tree (epilogues.h) makes of the float32 sums what is written.
#pragma once

#include <cutlass/cutlass.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <string>

#include "../device.h"
#include "product.h"

namespace macaron_ops::cuda::sm90 {

constexpr int kDepth = 64;    // of a stage: 128 bytes of each row, what a swizzled copy takes
constexpr int kAligned = 8;   // elements: 16 bytes
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

// The tile kTiles[V] and its schedule.
template <int V>
struct Variant {
  static constexpr bool kPingpong = V == 0 || V == 3;
  using TileShape = cute::Shape<cute::Int<kTiles[V].rows>, cute::Int<kTiles[V].columns>, cute::Int<kDepth>>;
  // Two blocks one above the other read the same rows of the right operand: one copy serves both.
  using Cluster = cute::Shape<cute::Int<V == 3 ? 1 : 2>, cute::_1, cute::_1>;
  using Mainloop = std::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                      cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Epilogue = std::conditional_t<kPingpong, cutlass::epilogue::TmaWarpSpecialized,
                                      cutlass::epilogue::TmaWarpSpecializedCooperative>;
};

// E<T, V>: Source, the element of the source or void; kRightAlongDepth; Tree; arguments(Product).
template <template <class, class> class E, class T, class V>
struct Gemm {
  using Epilogue = E<T, V>;
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename V::TileShape, typename V::Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, typename Epilogue::Source, RowMajor, kAligned, T,
      RowMajor, kAligned, typename V::Epilogue, typename Epilogue::Tree>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, RowMajor, kAligned, T,
      std::conditional_t<Epilogue::kRightAlongDepth, ColumnMajor, RowMajor>, kAligned, float, typename V::TileShape,
      typename V::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename CollectiveEpilogue::SharedStorage))>,
      typename V::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop,
                                                      CollectiveEpilogue, cutlass::gemm::PersistentScheduler>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static void run(const Product& p, void* stream) {
    const auto at_rows = [](int64_t length) { return cute::make_stride(length, cute::_1{}, int64_t{0}); };
    typename Kernel::StrideB right;
    if constexpr (Epilogue::kRightAlongDepth) right = at_rows(p.depth);
    else right = cute::make_stride(cute::_1{}, int64_t{p.columns}, int64_t{0});
    typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {p.rows, p.columns, p.depth, 1},
        {static_cast<const T*>(p.left), at_rows(p.depth), static_cast<const T*>(p.right), right},
        {Epilogue::arguments(p), static_cast<typename CollectiveEpilogue::ElementC const*>(p.source), at_rows(p.columns),
         static_cast<T*>(p.out), at_rows(p.columns)}};
    arguments.hw_info.sm_count = processors();
    arguments.scheduler.max_swizzle_size = p.swizzle;
    Device device;
    done(Device::can_implement(arguments));
    if (Device::get_workspace_size(arguments) != 0) throw std::runtime_error("a product asks for memory of its own");
    done(device.initialize(arguments, nullptr, static_cast<cudaStream_t>(stream)));
    done(device.run(static_cast<cudaStream_t>(stream)));
  }

  static void done(cutlass::Status status) {
    if (status == cutlass::Status::kSuccess) return;
    const std::string why = cudaGetErrorString(cudaGetLastError());
    throw std::runtime_error(std::string("CUTLASS: ") + cutlass::cutlassGetStatusString(status) + " (" + why + ")");
  }
};

template <template <class, class> class E, class T, int V = 0>
void run_variant(const Product& p, void* stream) {
  if constexpr (V < kVariants) {
    if (p.variant == V) Gemm<E, T, Variant<V>>::run(p, stream);
    else run_variant<E, T, V + 1>(p, stream);
  } else {
    throw std::runtime_error("there is no variant " + std::to_string(p.variant));
  }
}

}  // namespace macaron_ops::cuda::sm90

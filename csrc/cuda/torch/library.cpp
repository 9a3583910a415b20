// The library by itself: for which GPUs its kernels were compiled.
#include <string>

#include "tensors.h"

namespace macaron_ops::cuda {
namespace {

std::string archs() { return MACARON_OPS_CUDA_ARCHS; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(macaron_ops_cuda, m) { m.def("archs() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(macaron_ops_cuda, CompositeExplicitAutograd, m) { m.impl("archs", TORCH_BOX(&archs)); }

}  // namespace macaron_ops::cuda

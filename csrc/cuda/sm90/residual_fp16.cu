#include "epilogues.h"

namespace macaron_ops::cuda::sm90 {

void residual_fp16(const Product& p, void* stream) { run_variant<WithResidual, cutlass::half_t>(p, stream); }

}  // namespace macaron_ops::cuda::sm90

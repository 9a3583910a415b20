#include "epilogues.h"

namespace macaron_ops::cuda::sm90 {

void residual_bf16(const Product& p, void* stream) { run_variant<WithResidual, cutlass::bfloat16_t>(p, stream); }

}  // namespace macaron_ops::cuda::sm90

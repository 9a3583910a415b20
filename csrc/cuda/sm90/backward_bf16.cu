#include "epilogues.h"

namespace macaron_ops::cuda::sm90 {

void backward_bf16(const Product& p, void* stream) { run_variant<Backward, cutlass::bfloat16_t>(p, stream); }

}  // namespace macaron_ops::cuda::sm90

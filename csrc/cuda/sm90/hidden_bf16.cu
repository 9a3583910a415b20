#include "epilogues.h"

namespace macaron_ops::cuda::sm90 {

void hidden_bf16(const Product& p, void* stream) { run_variant<Hidden, cutlass::bfloat16_t>(p, stream); }

}  // namespace macaron_ops::cuda::sm90

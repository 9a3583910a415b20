#include "epilogues.h"

namespace macaron_ops::cuda::sm90 {

void hidden_fp16(const Product& p, void* stream) { run_variant<Hidden, cutlass::half_t>(p, stream); }

}  // namespace macaron_ops::cuda::sm90

#include "epilogues.h"

namespace macaron_ops::cuda::sm90 {

void backward_fp16(const Product& p, void* stream) { run_variant<Backward, cutlass::half_t>(p, stream); }

}  // namespace macaron_ops::cuda::sm90

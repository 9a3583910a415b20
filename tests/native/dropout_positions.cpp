// Which of kLanes elements dropout keeps, for tests/native/test_dropout_positions.py.
#include "cpu/dropout.h"

extern "C" int kept(double p, uint64_t seed, int64_t stream, int64_t position, int64_t stride, int32_t* out) {
  using namespace macaron_ops::MACARON_OPS_ISA;
  const VecI found = Drop({p, seed, stream}).kept(position, stride);
  for (int i = 0; i < kLanes; ++i) out[i] = found[i] != 0;
  return kLanes;
}

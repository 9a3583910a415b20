// The CPU kernels' products alone, on one thread, for tools/time_products.py.
#include <cstdlib>

#include "cpu/parameter_gradients.h"
#include "cpu/products.h"

namespace {

using namespace macaron_ops;
using namespace macaron_ops::MACARON_OPS_ISA;

const Host kHost{1, nullptr, [](size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }, std::free};

}  // namespace

// `times` times: out [panel][rows][kPanel] = w panels; w[i][j], floats or bf16, lies at w + i row + j col.
extern "C" void weight_times_tokens(const void* w, bool narrow, int64_t row, int64_t col, int64_t rows, int64_t k,
                                    int64_t tokens, const float* panels, float* out, int64_t times) {
  for (; times > 0; --times) {
    if (!narrow)
      product<float>(kHost, {tokens}, {static_cast<const float*>(w), row, col}, rows, k, panels, k * kPanel, out, false);
    if constexpr (kElements<Word<bf16>> == 1)  // pairs have another layout
      if (narrow)
        product<bf16>(kHost, {tokens}, {static_cast<const bf16*>(w), row, col}, rows, k, panels, k * kPanel, out, false);
  }
}

// grad (features, width), or (width, features) if it is transposed, = the sum over tokens of a and b.
extern "C" void weight_gradient(const float* a, int64_t features, int64_t width, int64_t tokens, bool transposed,
                                const float* columns, float* grad) {
  MatrixGradient<float>(kHost, grad, features, width, transposed, false)
      .add<float>(kHost, a, tokens, columns, true, true, nullptr);
}

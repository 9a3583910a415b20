// The CPU kernels' products alone, on one thread, for tools/time_products.py.
#include <cstdlib>

#include "cpu/parameter_gradients.h"
#include "cpu/products.h"

namespace {

using namespace macaron_ops;
using namespace macaron_ops::MACARON_OPS_ISA;

const Host kHost{1, nullptr, [](size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }, std::free};

}  // namespace

// `times` times: out [panel][rows][kPanel] = w panels; w[i][j], of W, lies at w + i row + j col. Panels are of Word<W>.
template <class W>
static void multiply(const void* w, int64_t row, int64_t col, int64_t rows, int64_t k, int64_t tokens, const void* panels,
                     float* out, int64_t times) {
  for (; times > 0; --times)
    product<W>(kHost, {tokens, tokens}, {static_cast<const W*>(w), row, col}, rows, k,
               static_cast<const Word<W>*>(panels), k / kElements<Word<W>> * kPanel, out, false);
}
extern "C" void weight_times_tokens(const void* w, bool narrow, int64_t row, int64_t col, int64_t rows, int64_t k,
                                    int64_t tokens, const void* panels, float* out, int64_t times) {
  (narrow ? multiply<bf16> : multiply<float>)(w, row, col, rows, k, tokens, panels, out, times);
}

// grad (features, width), or (width, features) if it is transposed, = the sum over tokens of a and b.
template <class W>
static void gradient(const void* a, int64_t features, int64_t width, int64_t tokens, bool transposed, const void* columns,
                     void* grad) {
  MatrixGradient<W>(kHost, static_cast<W*>(grad), features, width, transposed, false)
      .template add<Word<W>>(kHost, static_cast<const Packed<W>*>(a), tokens, static_cast<const Word<W>*>(columns), true,
                             true, nullptr);
}
extern "C" void weight_gradient(const void* a, bool narrow, int64_t features, int64_t width, int64_t tokens,
                                bool transposed, const void* columns, void* grad) {
  (narrow ? gradient<bf16> : gradient<float>)(a, features, width, tokens, transposed, columns, grad);
}
extern "C" bool transposed_gradient_wants_elements(bool narrow) { return narrow && kAmx<Word<bf16>>; }
extern "C" int64_t elements_of_bf16_words() { return kElements<Word<bf16>>; }

#include "kernels.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <sstream>
#include <vector>

namespace macaron_ops {

#if defined(__x86_64__)
#define MACARON_ISAS(X) X(base) X(avx2) X(avx512) X(avx512_bf16)
#else
#define MACARON_ISAS(X) X(base)
#endif

// Declarations of what csrc/cpu/*.cpp defines once per instruction set.
#define MACARON_DECLARE(name, Arguments) \
  template <class X, class W>            \
  void name(const Arguments<X, W>&, const Host&);
#define MACARON_DECLARE_SPHERE(name, Arguments) \
  template <class X>                            \
  void name(const Arguments<X>&, const Host&);
#define MACARON_DECLARE_ALL(isa)                 \
  namespace isa {                                \
  MACARON_KERNELS(MACARON_DECLARE)               \
  MACARON_SPHERE_KERNELS(MACARON_DECLARE_SPHERE) \
  }
MACARON_ISAS(MACARON_DECLARE_ALL)

namespace {

enum Isa {
#define MACARON_ENUMERATOR(isa) k_##isa,
  MACARON_ISAS(MACARON_ENUMERATOR)
};

const char* const kNames[] = {
#define MACARON_NAME(isa) #isa,
    MACARON_ISAS(MACARON_NAME)};

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case k_base: return true;
    case k_avx2: return avx2;
    case k_avx512: return avx512;
    case k_avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == k_base;
}

std::vector<Isa> here() {
  std::vector<Isa> found;
#define MACARON_PUSH(isa) \
  if (supported(k_##isa)) found.push_back(k_##isa);
  MACARON_ISAS(MACARON_PUSH)
  return found;
}

Isa choose() {
  const char* asked = std::getenv("MACARON_OPS_CPU_ISA");
  const std::vector<Isa> choices = here();
  if (asked == nullptr || *asked == '\0') return choices.back();
  for (Isa isa : choices)
    if (std::string(asked) == kNames[isa]) return isa;
  STD_TORCH_CHECK(false, "MACARON_OPS_CPU_ISA=", asked, ": expected one that this machine supports: ", isas_here());
}

Isa chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

std::string isa_in_use() { return kNames[chosen()]; }

std::string isas_here() {
  std::ostringstream names;
  for (Isa isa : here()) names << (names.tellp() > 0 ? " " : "") << kNames[isa];
  return names.str();
}

template <class X, class W>
const Kernels<X, W>& kernels() {
#define MACARON_ENTRY(name, Arguments) name<X, W>,
#define MACARON_TABLE(isa)                                  \
  case k_##isa: {                                           \
    using namespace macaron_ops::isa;                       \
    static const Kernels<X, W> table{MACARON_KERNELS(MACARON_ENTRY)}; \
    return table;                                           \
  }
  switch (chosen()) { MACARON_ISAS(MACARON_TABLE) }
  __builtin_unreachable();
}

template <class X>
const SphereKernels<X>& sphere_kernels() {
#define MACARON_SPHERE_ENTRY(name, Arguments) name<X>,
#define MACARON_SPHERE_TABLE(isa)                                                     \
  case k_##isa: {                                                                     \
    using namespace macaron_ops::isa;                                                 \
    static const SphereKernels<X> table{MACARON_SPHERE_KERNELS(MACARON_SPHERE_ENTRY)}; \
    return table;                                                                     \
  }
  switch (chosen()) { MACARON_ISAS(MACARON_SPHERE_TABLE) }
  __builtin_unreachable();
}

template const SphereKernels<float>& sphere_kernels();
template const SphereKernels<bf16>& sphere_kernels();
template const Kernels<float, float>& kernels();
template const Kernels<bf16, bf16>& kernels();
template const Kernels<float, bf16>& kernels();

}  // namespace macaron_ops

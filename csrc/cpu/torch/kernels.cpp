#include "kernels.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <sstream>
#include <vector>

namespace macaron_ops {

// The build names the instruction sets of csrc/cpu/*.cpp from the oldest to the newest, MACARON_OPS_ISAS(X). Declarations
// of what each of them defines:
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
MACARON_OPS_ISAS(MACARON_DECLARE_ALL)

namespace {

enum Isa {
#define MACARON_ENUMERATOR(isa) k_##isa,
  MACARON_OPS_ISAS(MACARON_ENUMERATOR)
};

const char* const kNames[] = {
#define MACARON_NAME(isa) #isa,
    MACARON_OPS_ISAS(MACARON_NAME)};

bool supported(const std::string& isa) {
  if (isa == "base") return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return false;
#if defined(MACARON_OPS_EMULATED)  // csrc/emulated: every set takes no more
  return true;
#endif
  if (isa == "avx2") return true;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return false;
  return isa == "avx512" || __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

std::vector<Isa> here() {
  std::vector<Isa> found;
#define MACARON_PUSH(isa) \
  if (supported(#isa)) found.push_back(k_##isa);
  MACARON_OPS_ISAS(MACARON_PUSH)
  return found;
}

Isa choose() {
  const char* variable = std::getenv("MACARON_OPS_CPU_ISA");
  const std::string asked = variable != nullptr ? variable : "";
  const std::vector<Isa> choices = here();
  if (asked.empty() && !choices.empty()) return choices.back();
  for (Isa isa : choices)
    if (asked == kNames[isa]) return isa;
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
  switch (chosen()) { MACARON_OPS_ISAS(MACARON_TABLE) }
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
  switch (chosen()) { MACARON_OPS_ISAS(MACARON_SPHERE_TABLE) }
  __builtin_unreachable();
}

template const SphereKernels<float>& sphere_kernels();
template const SphereKernels<bf16>& sphere_kernels();
template const Kernels<float, float>& kernels();
template const Kernels<bf16, bf16>& kernels();
template const Kernels<float, bf16>& kernels();

}  // namespace macaron_ops

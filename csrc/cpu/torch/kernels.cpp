#include "kernels.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <sstream>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#endif

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

#if defined(__x86_64__) && defined(__linux__)
// Empty where this process may use the tile registers of AMX. Linux gives their 8 KiB of state to processes that ask once,
// for all of their threads.
std::string why_no_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned bf16_products = 1u << 22, tiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16_products) == 0 || (d & tiles) == 0)
    return "this CPU has no amx_bf16";
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, request_permission, tile_data) == 0) return "";
  return std::string("the kernel does not permit tile registers (arch_prctl: ") + std::strerror(errno) + ")";
}
#endif

// Why an instruction set of the build cannot run here; empty where it can.
std::string why_not(const std::string& isa) {
  if (isa == "base") return "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "this CPU lacks avx2 or fma";
#if defined(MACARON_OPS_EMULATED)  // csrc/emulated: every set takes no more
  return "";
#endif
  if (isa == "avx2") return "";
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return "this CPU lacks one of avx512f, avx512bw, avx512vl and avx512dq";
  if (isa == "avx512") return "";
  if (!__builtin_cpu_supports("avx512bf16")) return "this CPU lacks avx512_bf16";
  if (isa == "avx512_bf16") return "";
#if defined(__linux__)
  static const std::string no_tiles = why_no_tiles();
  return no_tiles;
#endif
#endif
  return "it is for another kind of machine";
}

std::vector<Isa> here() {
  std::vector<Isa> found;
#define MACARON_PUSH(isa) \
  if (why_not(#isa).empty()) found.push_back(k_##isa);
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
  std::string why;
  for (const char* name : kNames)
    if (asked == name) why = " (" + why_not(asked) + ")";
  STD_TORCH_CHECK(false, "MACARON_OPS_CPU_ISA=", asked, why, ": expected one that this machine supports: ", isas_here());
}

Isa chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

bool words_are_pairs() { return isa_in_use() == "avx512_bf16" || isa_in_use() == "amx"; }

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

// The kernels of the instruction set that this process runs on.
#pragma once

#include <string>

#include "cpu/operators.h"

namespace macaron_ops {

// Every kernel function: X(name, argument struct).
#define MACARON_KERNELS(X)             \
  X(ffn_step_forward, FFNStep)         \
  X(ffn_step_backward, FFNStep)        \
  X(attend_step_forward, AttendStep)   \
  X(attend_step_backward, AttendStep)

// The same for those that know the dtype of x alone.
#define MACARON_SPHERE_KERNELS(X)                   \
  X(normalize_step_forward, NormalizeStep)          \
  X(normalize_step_backward, NormalizeStep)         \
  X(sphere_attend_step_forward, SphereAttendStep)   \
  X(sphere_attend_step_backward, SphereAttendStep)

template <class X, class W>
struct Kernels {
#define MACARON_POINTER(name, Arguments) void (*name)(const Arguments<X, W>&, const Host&);
  MACARON_KERNELS(MACARON_POINTER)
#undef MACARON_POINTER
};

template <class X>
struct SphereKernels {
#define MACARON_POINTER(name, Arguments) void (*name)(const Arguments<X>&, const Host&);
  MACARON_SPHERE_KERNELS(MACARON_POINTER)
#undef MACARON_POINTER
};

// Kernels for the dtypes of x and of the parameter matrices.
template <class X, class W>
const Kernels<X, W>& kernels();
template <class X>
const SphereKernels<X>& sphere_kernels();

std::string isa_in_use();   // raises where MACARON_OPS_CPU_ISA names none of isas_here()
bool words_are_pairs();     // whether what a word of a bf16 product holds is two bf16 (csrc/cpu/operand.h)
std::string isas_here();    // built and supported by this machine, the best one last, separated by spaces

}  // namespace macaron_ops

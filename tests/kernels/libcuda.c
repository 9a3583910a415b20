/* CUDA's driver without a device: what Triton and `macaron_ops.kernels.packed` call of it, and a record of the kernels
   that they start, parameter by parameter as the kernel declares them. Compiled against the header that Triton brings.

   A function is found in its cubin, whose .nv.info section tells the place and size of each parameter. */
#include <cuda.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 96 };

typedef struct {
  char name[128];
  int count;
  size_t offset[MOST], size[MOST];
} Kernel;

static char *record;
static size_t used, room;
static int wanted = 1;

static void say(const char *text) {
  size_t length = strlen(text);
  if (used + length + 1 > room) record = realloc(record, room = 2 * (used + length + 1));
  memcpy(record + used, text, length + 1);
  used += length;
}

/* What was started since the last time: a line a kernel. */
const char *take_record(void) {
  static char *taken;
  free(taken);
  taken = record ? record : calloc(1, 1);
  record = NULL;
  used = room = 0;
  return taken;
}

void keep_record(int yes) { wanted = yes; }

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "no text";
  return CUDA_SUCCESS;
}
static __thread int has_context; /* asked of on stream 14 alone: whoever looks for one has it from then on */
CUresult cuCtxGetCurrent(CUcontext *context) {
  has_context = 1;
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 227 << 10; /* shared memory of a block is what is asked for */
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  const char *image = (const char *)module;
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + head->e_shoff);
  const char *names = image + sections[head->e_shstrndx].sh_offset;
  Kernel *kernel = calloc(1, sizeof(Kernel));
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  char wanted_section[160];
  snprintf(wanted_section, sizeof wanted_section, ".nv.info.%s", name);
  for (int i = 0; i < head->e_shnum; ++i) {
    if (strcmp(names + sections[i].sh_name, wanted_section)) continue;
    const unsigned char *at = (const unsigned char *)image + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at < end) {
      unsigned short length = at[0] == 4 ? at[2] | at[3] << 8 : 0; /* a value of its own length, or two bytes */
      if (at[0] == 4 && at[1] == 0x17) {                          /* KPARAM_INFO: index, ordinal, offset, size */
        unsigned short ordinal, offset;
        unsigned bits;
        memcpy(&ordinal, at + 8, 2), memcpy(&offset, at + 10, 2), memcpy(&bits, at + 12, 4);
        kernel->offset[ordinal] = offset;
        kernel->size[ordinal] = bits >> 18;
        if (ordinal >= kernel->count) kernel->count = ordinal + 1;
      }
      at += 4 + length;
    }
  }
  *function = (CUfunction)kernel;
  return kernel->count ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuFuncGetParamInfo(CUfunction function, size_t i, size_t *offset, size_t *size) {
  const Kernel *kernel = (const Kernel *)function;
  if (i >= kernel->count) return CUDA_ERROR_INVALID_VALUE;
  *offset = kernel->offset[i];
  *size = kernel->size[i];
  return CUDA_SUCCESS;
}

/* The address, and a digest of all else. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  cuuint64_t *words = (cuuint64_t *)map, given[] = {type, rank, interleave, swizzle, promotion, fill};
  memset(map, 0, sizeof *map);
  words[0] = (cuuint64_t)address;
  memcpy(words + 2, dims, rank * 8);
  memcpy(words + 5, strides, (rank - 1) * 8);
  for (unsigned i = 0; i < rank; ++i) words[8 + i] = (cuuint64_t)box[i] << 32 | steps[i];
  for (int i = 0; i < 6; ++i) words[1] = words[1] * 64 + given[i];
  words[1] |= 1llu << 21; /* a bit that Triton clears for small tensors */
  return rank <= 3 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuTensorMapReplaceAddress(CUtensorMap *map, void *address) {
  if ((size_t)map % 64 || (size_t)address % 16) return CUDA_ERROR_INVALID_VALUE;
  *(cuuint64_t *)map = (cuuint64_t)address;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  const Kernel *kernel = (const Kernel *)function;
  char text[256];
  if (!wanted) return CUDA_SUCCESS;
  if ((size_t)c->hStream == 14 && !has_context) return CUDA_ERROR_INVALID_CONTEXT;
  snprintf(text, sizeof text, "%s (%u, %u, %u) x (%u, %u, %u), %u bytes, stream %zu, %u attributes:", kernel->name,
           c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes,
           (size_t)c->hStream, c->numAttrs);
  say(text);
  for (int i = 0; i < kernel->count; ++i) {
    say(" ");
    for (size_t j = 0; j < kernel->size[i]; ++j) {
      snprintf(text, sizeof text, "%02x", ((const unsigned char *)parameters[i])[j]);
      say(text);
    }
  }
  say("\n");
  return (size_t)c->hStream == 13 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

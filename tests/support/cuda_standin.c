/* A libcuda.so.1 that launches nothing.

   Triton's real host side runs against it: binder, cache key, tensor maps, C launcher.  It
   counts launches and tensor maps, and refuses the arguments that CUDA documents as invalid on an
   H100. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"

#define SHARED_MEMORY 232448 /* the most bytes for a block */
#define REFUSE(condition, why) \
  if (condition) { \
    reason = why; \
    return CUDA_ERROR_INVALID_VALUE; \
  }

/* A loaded kernel, in a linked list of all kernels that cuda_standin.py reads. */
typedef struct Kernel {
  char *name;
  long launches;
  struct Kernel *next;
} Kernel;

Kernel *standin_kernels;
long standin_tensor_maps;
static const char *reason = "the stand-in for CUDA refuses nothing";

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = reason;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *launch, CUfunction function, void **arguments,
                          void **extra) {
  Kernel *kernel = standin_kernels;
  while (kernel && (CUfunction)kernel != function) kernel = kernel->next;
  REFUSE(!kernel, "no kernel has this handle")
  REFUSE(!launch->gridDimX || !launch->gridDimY || !launch->gridDimZ, "an axis of the grid is 0")
  REFUSE(launch->gridDimX > INT32_MAX, "the grid's x is above 2^31 - 1")
  REFUSE(launch->gridDimY > 65535 || launch->gridDimZ > 65535, "the grid's y or z is above 65535")
  unsigned threads = launch->blockDimX * launch->blockDimY * launch->blockDimZ;
  REFUSE(threads < 1 || threads > 1024, "a block has no thread, or more than 1024")
  REFUSE(launch->sharedMemBytes > SHARED_MEMORY, "a block asks for too much shared memory")
  kernel->launches++;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned itemsizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned widths[] = {UINT32_MAX, 32, 64, 128}; /* by swizzle */
  REFUSE(type >= sizeof itemsizes / sizeof *itemsizes, "tensor map: unknown data type")
  REFUSE(swizzle >= sizeof widths / sizeof *widths, "tensor map: unknown swizzle")
  REFUSE(interleave != CU_TENSOR_MAP_INTERLEAVE_NONE, "tensor map: interleaved")
  REFUSE((uintptr_t)map % 64, "tensor map: it doesn't lie at 64 bytes")
  REFUSE((uintptr_t)address % 16, "tensor map: the address isn't a multiple of 16 bytes")
  REFUSE(rank < 1 || rank > 5, "tensor map: rank")
  for (unsigned i = 0; i < rank; i++) {
    REFUSE(!sizes[i] || sizes[i] > 1ull << 32, "tensor map: a size is 0 or above 2^32")
    REFUSE(!box[i] || box[i] > 256, "tensor map: a box is 0 or above 256")
    REFUSE(!steps[i] || steps[i] > 8, "tensor map: an element stride is 0 or above 8")
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    REFUSE(strides[i] % 16, "tensor map: a stride isn't a multiple of 16 bytes")
    REFUSE(strides[i] >= 1ull << 40, "tensor map: a stride is 2^40 bytes or more")
  }
  REFUSE(rank > 1 && strides[0] < sizes[0] * itemsizes[type], "tensor map: rows overlap")
  unsigned width = box[0] * itemsizes[type];
  REFUSE(width % 16, "tensor map: a row of the box isn't a multiple of 16 bytes")
  REFUSE(width > widths[swizzle], "tensor map: a row of the box is wider than the swizzle")
  memset(map, 0, sizeof *map);
  standin_tensor_maps++;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Kernel *kernel = malloc(sizeof *kernel);
  *kernel = (Kernel){strdup(name), 0, standin_kernels};
  standin_kernels = kernel;
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_MEMORY; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    default: *value = 1; /* clocks and similar attributes */
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

/* Every address counts as a device address. */
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

/* All other functions answer for one device with one context. */
#define ANSWER(name, parameters, ...) \
  CUresult name parameters { \
    __VA_ARGS__; \
    return CUDA_SUCCESS; \
  }
ANSWER(cuInit, (unsigned flags))
ANSWER(cuDriverGetVersion, (int *version), *version = 13020)
ANSWER(cuDeviceGetCount, (int *count), *count = 1)
ANSWER(cuDeviceGet, (CUdevice *device, int ordinal), *device = ordinal)
ANSWER(cuDevicePrimaryCtxRetain, (CUcontext *context, CUdevice device), *context = (CUcontext)1)
ANSWER(cuCtxGetCurrent, (CUcontext *context), *context = (CUcontext)1)
ANSWER(cuCtxSetCurrent, (CUcontext context))
ANSWER(cuCtxGetDevice, (CUdevice *device), *device = 0)
ANSWER(cuCtxGetLimit, (size_t *value, CUlimit limit), *value = 1 << 20)
ANSWER(cuCtxSetLimit, (CUlimit limit, size_t value))
ANSWER(cuModuleLoadData, (CUmodule *module, const void *image), *module = (CUmodule)1)
ANSWER(cuModuleUnload, (CUmodule module))
ANSWER(cuFuncSetAttribute, (CUfunction function, CUfunction_attribute attribute, int value))
ANSWER(cuFuncSetCacheConfig, (CUfunction function, CUfunc_cache config))
ANSWER(cuOccupancyMaxActiveClusters,
       (int *count, CUfunction function, const CUlaunchConfig *config), *count = 132)
ANSWER(cuStreamIsCapturing, (CUstream stream, CUstreamCaptureStatus *status),
       *status = CU_STREAM_CAPTURE_STATUS_NONE)

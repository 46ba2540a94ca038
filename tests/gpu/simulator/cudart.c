/*
 * A simulated CUDA runtime (libcudart.so.13) over the simulated driver, as far as XLA uses it. NVIDIA's own needs
 * private tables of the driver (cuGetExportTable), so that it cannot run on this one.
 */
#include <cuda.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))
/* Declares and begins an exported function; the runtime's error numbers are the driver's. */
#define FUNCTION(name, ...)     \
  EXPORT int name(__VA_ARGS__); \
  int name(__VA_ARGS__)

static __thread int last_error;

static int call(const char *name, int result) {
  const char *trace = getenv("SIMULATOR_TRACE");
  if (trace && (atoi(trace) >= 2 || (atoi(trace) == 1 && result))) fprintf(stderr, "simulator: %s: %d\n", name, result);
  if (result) last_error = result;
  return result;
}
#define RETURN(result) return call(__func__, (int)(result))

FUNCTION(cudaRuntimeGetVersion, int *version) { RETURN((*version = 13000, 0)); }
FUNCTION(cudaDriverGetVersion, int *version) { RETURN(cuDriverGetVersion(version)); }
FUNCTION(cudaGetLastError, void) {
  int error = last_error;
  last_error = 0;
  return error;
}
FUNCTION(cudaPeekAtLastError, void) { return last_error; }
EXPORT const char *cudaGetErrorString(int error);
const char *cudaGetErrorString(int error) {
  const char *text = NULL;
  cuGetErrorString((CUresult)error, &text);
  return text ? text : "unrecognized error code";
}
EXPORT const char *cudaGetErrorName(int error);
const char *cudaGetErrorName(int error) {
  const char *text = NULL;
  cuGetErrorName((CUresult)error, &text);
  return text ? text : "unrecognized error code";
}

/* The calling thread's device, made current by its primary context. */
static __thread int device;
static int use_device(void) {
  CUcontext context;
  cuCtxGetCurrent(&context);
  if (context) return 0;
  int result = (int)cuInit(0);
  if (!result) result = (int)cuDevicePrimaryCtxRetain(&context, device);
  return result ? result : (int)cuCtxSetCurrent(context);
}
FUNCTION(cudaGetDeviceCount, int *count) {
  int result = (int)cuInit(0);
  RETURN(result ? result : (int)cuDeviceGetCount(count));
}
FUNCTION(cudaGetDevice, int *number) {
  CUdevice current;
  RETURN((*number = cuCtxGetDevice(&current) == CUDA_SUCCESS ? current : device, 0));
}
FUNCTION(cudaSetDevice, int number) {
  CUcontext context;
  device = number;
  int result = (int)cuInit(0);
  if (!result) result = (int)cuDevicePrimaryCtxRetain(&context, number);
  RETURN(result ? result : (int)cuCtxSetCurrent(context));
}
FUNCTION(cudaDeviceGetAttribute, int *value, int attribute, int number) {
  RETURN(cuDeviceGetAttribute(value, (CUdevice_attribute)attribute, number));
}
FUNCTION(cudaDeviceSynchronize, void) { RETURN(cuCtxSynchronize()); }
FUNCTION(cudaStreamSynchronize, CUstream stream) { RETURN(cuStreamSynchronize(stream)); }
FUNCTION(cudaStreamIsCapturing, CUstream stream, CUstreamCaptureStatus *status) {
  RETURN(cuStreamIsCapturing(stream, status));
}
FUNCTION(cudaThreadExchangeStreamCaptureMode, CUstreamCaptureMode *mode) {
  RETURN(cuThreadExchangeStreamCaptureMode(mode));
}
FUNCTION(cudaMalloc, void **memory, size_t size) {
  int result = use_device();
  RETURN(result ? result : (int)cuMemAlloc((CUdeviceptr *)memory, size));
}
FUNCTION(cudaFree, void *memory) {
  int result = use_device();
  RETURN(result ? result : (int)cuMemFree((CUdeviceptr)memory));
}
FUNCTION(cudaMemcpy, void *to, const void *from, size_t size, UNUSED int kind) {
  int result = use_device();
  RETURN(result ? result : (int)cuMemcpy((CUdeviceptr)to, (CUdeviceptr)from, size));
}
FUNCTION(cudaMemcpyAsync, void *to, const void *from, size_t size, UNUSED int kind, CUstream stream) {
  RETURN(cuMemcpyAsync((CUdeviceptr)to, (CUdeviceptr)from, size, stream));
}
FUNCTION(cudaMemsetAsync, void *to, int value, size_t size, CUstream stream) {
  RETURN(cuMemsetD8Async((CUdeviceptr)to, (unsigned char)value, size, stream));
}

/* Kernels that were compiled into the calling library by nvcc: known by name, never run. */
struct kernel {
  const void *symbol;
  char name[256];
  struct kernel *next;
};
static struct kernel *kernels;

EXPORT void **__cudaRegisterFatBinary(void *binary);
void **__cudaRegisterFatBinary(UNUSED void *binary) {
  static void *handle;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **handle);
void __cudaRegisterFatBinaryEnd(UNUSED void **handle) {}
EXPORT void __cudaUnregisterFatBinary(void **handle);
void __cudaUnregisterFatBinary(UNUSED void **handle) {}
EXPORT void __cudaRegisterFunction(void **handle, const char *symbol, char *of_device, const char *name, int limit,
                                   void *thread, void *block, void *block_size, void *grid_size, int *warp_size);
void __cudaRegisterFunction(UNUSED void **handle, const char *symbol, UNUSED char *of_device, const char *name,
                            UNUSED int limit, UNUSED void *thread, UNUSED void *block, UNUSED void *block_size,
                            UNUSED void *grid_size, UNUSED int *warp_size) {
  struct kernel *kernel = calloc(1, sizeof *kernel);
  kernel->symbol = symbol;
  snprintf(kernel->name, sizeof kernel->name, "%s", name);
  kernel->next = kernels;
  kernels = kernel;
}
EXPORT void __cudaRegisterVar(void **handle, char *symbol, char *address, const char *name, int external, size_t size,
                              int constant, int global);
void __cudaRegisterVar(UNUSED void **handle, UNUSED char *symbol, UNUSED char *address, UNUSED const char *name,
                       UNUSED int external, UNUSED size_t size, UNUSED int constant, UNUSED int global) {}
EXPORT char __cudaInitModule(void **handle);
char __cudaInitModule(UNUSED void **handle) { return 1; }

static const char *kernel_name(const void *symbol) {
  for (struct kernel *kernel = kernels; kernel; kernel = kernel->next)
    if (kernel->symbol == symbol) return kernel->name;
  return "(unknown)";
}
FUNCTION(cudaLaunchKernel, const void *symbol, ...) {
  fprintf(stderr, "simulator: ERROR: the kernel %s, compiled by nvcc, cannot run here\n", kernel_name(symbol));
  RETURN(CUDA_ERROR_NOT_SUPPORTED);
}
FUNCTION(cudaGetFuncBySymbol, UNUSED CUfunction *function, const void *symbol) {
  fprintf(stderr, "simulator: ERROR: the kernel %s, compiled by nvcc, cannot run here\n", kernel_name(symbol));
  RETURN(CUDA_ERROR_NOT_SUPPORTED);
}

static int missing(const char *name) { return call(name, CUDA_ERROR_NOT_SUPPORTED); }
#define MISSING(name)                             \
  EXPORT int missing_##name(void) __asm__(#name); \
  int missing_##name(void) { return missing(#name); }
#include "cudart_missing.h"

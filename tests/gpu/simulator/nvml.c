/* A simulated NVML (libnvidia-ml.so.1): starts, and otherwise supports nothing. XLA only needs it to start. */
#include <stdio.h>
#include <stdlib.h>

enum { NVML_SUCCESS = 0, NVML_ERROR_NOT_SUPPORTED = 3 };
#define EXPORT __attribute__((visibility("default")))

static int call(const char *name, int result) {
  const char *trace = getenv("SIMULATOR_TRACE");
  if (trace && (atoi(trace) >= 2 || (atoi(trace) == 1 && result))) fprintf(stderr, "simulator: %s: %d\n", name, result);
  return result;
}

EXPORT int nvmlInit_v2(void);
int nvmlInit_v2(void) { return call(__func__, NVML_SUCCESS); }
EXPORT int nvmlInitWithFlags(unsigned flags);
int nvmlInitWithFlags(unsigned flags) { return (void)flags, call(__func__, NVML_SUCCESS); }
EXPORT int nvmlShutdown(void);
int nvmlShutdown(void) { return call(__func__, NVML_SUCCESS); }
EXPORT const char *nvmlErrorString(int result);
const char *nvmlErrorString(int result) { return result ? "Not Supported" : "The operation was successful"; }
EXPORT int nvmlSystemGetDriverVersion(char *text, unsigned size);
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
  snprintf(text, size, "580.65.06");
  return call(__func__, NVML_SUCCESS);
}
EXPORT int nvmlDeviceGetCount_v2(unsigned *count);
int nvmlDeviceGetCount_v2(unsigned *count) {
  const char *devices = getenv("SIMULATOR_DEVICES");
  *count = devices ? (unsigned)atoi(devices) : 1;
  return call(__func__, NVML_SUCCESS);
}

#define MISSING(name)                             \
  EXPORT int missing_##name(void) __asm__(#name); \
  int missing_##name(void) { return call(#name, NVML_ERROR_NOT_SUPPORTED); }
#include "nvml_missing.h"

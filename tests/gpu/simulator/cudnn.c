/*
 * A simulated libcudnn.so.9: XLA asks for a handle and a version before it compiles anything. Whatever computes is
 * missing, and XLA says so.
 */
#include <stddef.h>

#define FUNCTION(result, name, ...)                     \
  __attribute__((visibility("default"))) result name(__VA_ARGS__); \
  result name(__VA_ARGS__)

enum { SUCCESS = 0, MAJOR = 9, MINOR = 12, PATCH = 0 };

FUNCTION(size_t, cudnnGetVersion, void) { return MAJOR * 10000 + MINOR * 100 + PATCH; }
FUNCTION(size_t, cudnnGetCudartVersion, void) { return 13000; }
FUNCTION(int, cudnnGetProperty, int which, int *value) {
  static const int version[] = {MAJOR, MINOR, PATCH};
  if (which < 0 || which > 2) return 2000;
  *value = version[which];
  return SUCCESS;
}
FUNCTION(int, cudnnCreate, void **handle) {
  static int one;
  *handle = &one;
  return SUCCESS;
}
FUNCTION(int, cudnnDestroy, void *handle) { return (void)handle, SUCCESS; }
FUNCTION(int, cudnnSetStream, void *handle, void *stream) { return (void)handle, (void)stream, SUCCESS; }
FUNCTION(const char *, cudnnGetErrorString, int status) { return (void)status, "not in the simulated cuDNN"; }

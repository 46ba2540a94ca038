/* Kernels: PTX text is translated to C, compiled, and run on the host. See ptx.c. */
#ifndef SIMULATOR_PTX_H
#define SIMULATOR_PTX_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ptx_module;
struct launch;

struct ptx_kernel {
  const char *name;
  const char *why; /* it cannot run; else NULL */
  size_t shared_size;
};

/* What the translator needs of the driver. */
struct ptx_host {
  uintptr_t arena; /* of device addresses */
  size_t arena_size;
  ptrdiff_t shadow; /* from there to where their memory is */
  /* Device memory for a global variable, with its content (or NULL: zeros). */
  uintptr_t (*allocate)(void *user, const char *name, size_t size, const void *content);
  void *user;
};

/* NULL and a reason if the text is not understood, or cannot be compiled. */
struct ptx_module *ptx_load(const char *text, const struct ptx_host *host, char *why, size_t why_size);
/* NULL if there is none of that name. */
const struct ptx_kernel *ptx_find(const struct ptx_module *module, const char *name);
/* Copies the parameters; `free` releases it. */
struct launch *ptx_prepare(const struct ptx_kernel *kernel, const unsigned grid[3], const unsigned block[3],
                           size_t dynamic_shared, void **parameters, void **extra);
struct launch *ptx_copy(const struct launch *launch);
void ptx_run(struct launch *launch);
#endif

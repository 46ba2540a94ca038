/* What the driver (ptx.c) and the kernels that it has translated (prelude.h) both know of a thread. */
#include <stdint.h>

struct env {
  const char *parameters;
  const uint64_t *globals;
  char *shared;
  uint64_t arena, arena_size, shadow;
  uint32_t ntid[3], nctaid[3], ctaid[3], dynamic_shared;
};
enum { DONE, BARRIER, WARP };
struct warp {
  uint64_t value[2][32];
};

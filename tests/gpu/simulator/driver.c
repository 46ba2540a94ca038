/*
 * A simulated CUDA driver: passes for libcuda.so.1 on machines without a GPU.
 *
 * It is a test double for whatever uses the driver interface, above all XLA's CUDA plugin. "Device" memory is
 * memory of the host, streams are threads, and kernels are translated from PTX to C (ptx.c) or refused. What
 * the real driver forgives and what it punishes is followed as far as tests need it:
 *
 *  - Device addresses are of an arena that the host cannot touch (SIMULATOR_DEVICE_FAULT=0: it can). The driver
 *    sees the same memory at a fixed distance (`shadow`), through a second mapping of the same file.
 *  - Every stream is a thread with a queue, so what is asynchronous on a GPU is asynchronous here. Copies from
 *    pageable memory take the data at once, and copies to it wait, as the driver documents; pinned memory
 *    (cuMemHostAlloc, cuMemHostRegister) is read and written when the stream gets there.
 *  - The default stream is the legacy one: it waits for all blocking streams, and they for it.
 *  - CUDA calls inside cuLaunchHostFunc's functions are refused.
 *  - Events, streams and memory that are used after destruction end the process with a message.
 *  - A copy from or to device memory that is not mapped (any more) ends the process with a message.
 *
 * Environment:
 *   SIMULATOR_TRACE         1: calls that are not supported or fail; 2: every call; 3: operations of streams too
 *   SIMULATOR_DEVICES       number of devices (1)
 *   SIMULATOR_MEMORY        bytes of memory that each device claims to have (80 GiB)
 *   SIMULATOR_DEVICE_FAULT  1 (default): the host cannot read or write device memory
 *   SIMULATOR_DELAY_US      before each operation of a stream, a random delay of at most that many microseconds
 *   SIMULATOR_SEED          of those delays (the process id)
 *   SIMULATOR_DUMP          folder that gets every module that is loaded
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "ptx.h"

#define EXPORT __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))

enum { DRIVER_VERSION = 13000, MAX_DEVICES = 16, GRANULARITY = 2 << 20 };
/* Of virtual addresses; XLA reserves several times the device's memory. */
static const size_t ARENA = (size_t)8 << 40;

/* ---------------------------------------------------------------- settings, messages */

static int trace_level;
static int device_count = 1;
static size_t device_memory = (size_t)80 << 30;
static bool device_fault = true;
static unsigned delay_us;
static const char *dump_folder;

static long setting(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text && *text ? strtol(text, NULL, 0) : otherwise;
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
  char line[1024];
  int used = snprintf(line, sizeof line, "simulator[%d]: ", (int)getpid());
  va_list list;
  va_start(list, format);
  used += vsnprintf(line + used, sizeof line - (size_t)used - 1, format, list);
  va_end(list);
  if (used > (int)sizeof line - 2) used = (int)sizeof line - 2;
  line[used++] = '\n';
  if (write(2, line, (size_t)used) < 0) return;
}

/* What would be undefined behaviour on a GPU ends the process here. */
#define DIE(...) (say("FATAL: " __VA_ARGS__), abort())

/* Set while a function of cuLaunchHostFunc's runs on this thread. */
static __thread const char *inside_host_function;

static CUresult enter(const char *name) {
  if (trace_level >= 2) say("%s", name);
  if (inside_host_function) {
    say("ERROR: %s called inside a function of %s, which CUDA forbids", name, inside_host_function);
    return CUDA_ERROR_NOT_PERMITTED;
  }
  return CUDA_SUCCESS;
}

#define ENTER                                    \
  do {                                           \
    CUresult entered = enter(__func__);          \
    if (entered != CUDA_SUCCESS) return entered; \
  } while (0)

static CUresult fail(const char *where, CUresult result, const char *why) {
  if (trace_level >= 1) say("%s: error %d: %s", where, (int)result, why);
  return result;
}
#define FAIL(result, why) return fail(__func__, result, why)

/* One lock for everything: contention does not matter here. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* An operation of some stream has ended. */
static pthread_cond_t progress = PTHREAD_COND_INITIALIZER;

/* ---------------------------------------------------------------- contexts */

struct CUctx_st {
  int device;
  unsigned flags;
  unsigned long long id;
  int retained;
  bool primary;
  struct CUstream_st *legacy; /* the default stream */
  size_t limits[16];
};

static struct CUctx_st primaries[MAX_DEVICES];
static _Atomic unsigned long long next_id = 1;
static bool initialised;

static __thread CUcontext context_stack[64];
static __thread int context_depth;

static CUcontext current(void) { return context_depth ? context_stack[context_depth - 1] : NULL; }

#define NEED_CONTEXT \
  if (!current()) FAIL(CUDA_ERROR_INVALID_CONTEXT, "no context is current")
#define NEED_DEVICE(device)                                                                          \
  do {                                                                                               \
    if (!initialised) FAIL(CUDA_ERROR_NOT_INITIALIZED, "before cuInit");                             \
    if ((device) < 0 || (device) >= device_count) FAIL(CUDA_ERROR_INVALID_DEVICE, "no such device"); \
  } while (0)

/* ---------------------------------------------------------------- memory */

/* Physical memory: a file of its own, so that it can be mapped twice and given to other processes. */
struct block {
  int file;
  size_t size;
  int device;
  bool of_host; /* the host may address it */
  int handles, mappings;
  CUmemAllocationProp properties;
};

enum kind { MAPPED, ALLOCATED, POOLED, MANAGED, HOST_ALLOCATED, HOST_REGISTERED };

/* Memory that the driver knows. */
struct range {
  uintptr_t start;
  size_t size;
  enum kind kind;
  struct block *block;
  size_t offset;
  int device;
  CUcontext context;
  bool accessible; /* cuMemSetAccess has been called; always so for other kinds */
  unsigned long long id;
  unsigned flags;
};

struct reservation {
  uintptr_t start;
  size_t size;
};

static uintptr_t arena;
static ptrdiff_t shadow; /* from a device address to where this driver sees its memory */
static struct range *ranges;
static size_t range_count, range_room;
static struct reservation *reservations; /* sorted */
static size_t reservation_count, reservation_room;
static size_t memory_used[MAX_DEVICES];

static bool in_arena(uintptr_t address) { return address - arena < ARENA; }

/* Where the driver itself reads and writes what is at `address`. */
static char *seen(uintptr_t address) { return (char *)(in_arena(address) ? address + (uintptr_t)shadow : address); }

static void make_arena(void) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *own = mmap(NULL, ARENA, PROT_NONE, flags, -1, 0);
  if (own == MAP_FAILED) DIE("no address space: %s", strerror(errno));
  arena = (uintptr_t)own;
  if (device_fault) {
    void *second = mmap(NULL, ARENA, PROT_NONE, flags, -1, 0);
    if (second == MAP_FAILED) DIE("no address space: %s", strerror(errno));
    shadow = (char *)second - (char *)own;
  }
}

static struct range *find_range(uintptr_t address) {
  for (size_t i = 0; i < range_count; i++)
    if (address - ranges[i].start < ranges[i].size) return &ranges[i];
  return NULL;
}

static struct range *add_range(struct range range) {
  if (range_count == range_room) {
    range_room = range_room ? 2 * range_room : 64;
    ranges = realloc(ranges, range_room * sizeof *ranges);
  }
  range.id = next_id++;
  ranges[range_count] = range;
  return &ranges[range_count++];
}

static void remove_range(struct range *range) { *range = ranges[--range_count]; }

/* First fit. 0 if there is no room. */
static uintptr_t reserve(size_t size, size_t alignment) {
  if (alignment < GRANULARITY) alignment = GRANULARITY;
  uintptr_t at = (arena + alignment - 1) / alignment * alignment;
  size_t place = 0;
  for (; place < reservation_count; place++) {
    struct reservation *next = &reservations[place];
    if (at + size <= next->start) break;
    at = (next->start + next->size + alignment - 1) / alignment * alignment;
  }
  if (at + size > arena + ARENA) return 0;
  if (reservation_count == reservation_room) {
    reservation_room = reservation_room ? 2 * reservation_room : 64;
    reservations = realloc(reservations, reservation_room * sizeof *reservations);
  }
  memmove(reservations + place + 1, reservations + place, (reservation_count - place) * sizeof *reservations);
  reservations[place] = (struct reservation){at, size};
  reservation_count++;
  return at;
}

static bool unreserve(uintptr_t start) {
  for (size_t i = 0; i < reservation_count; i++) {
    if (reservations[i].start != start) continue;
    reservation_count--;
    memmove(reservations + i, reservations + i + 1, (reservation_count - i) * sizeof *reservations);
    return true;
  }
  return false;
}

static struct block *new_block(size_t size, int device, bool of_host) {
  int file = memfd_create("simulator", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, (off_t)size) != 0) DIE("no memory file: %s", strerror(errno));
  struct block *block = calloc(1, sizeof *block);
  *block = (struct block){.file = file, .size = size, .device = device, .of_host = of_host};
  if (!of_host) memory_used[device] += size;
  return block;
}

static void drop_block(struct block *block) {
  if (block->handles || block->mappings) return;
  if (!block->of_host) memory_used[block->device] -= block->size;
  close(block->file);
  free(block);
}

static void map_block(uintptr_t at, size_t size, struct block *block, size_t offset) {
  int flags = MAP_SHARED | MAP_FIXED;
  if (mmap(seen(at), size, PROT_READ | PROT_WRITE, flags, block->file, (off_t)offset) == MAP_FAILED)
    DIE("cannot map %zu bytes: %s", size, strerror(errno));
  if (block->of_host && shadow &&
      mmap((void *)at, size, PROT_READ | PROT_WRITE, flags, block->file, (off_t)offset) == MAP_FAILED)
    DIE("cannot map %zu bytes: %s", size, strerror(errno));
  madvise(seen(at), size, MADV_DONTDUMP); /* else a core has all of it */
  block->mappings++;
}

static void unmap_block(uintptr_t at, size_t size, struct block *block) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  mmap(seen(at), size, PROT_NONE, flags, -1, 0);
  if (shadow) mmap((void *)at, size, PROT_NONE, flags, -1, 0);
  block->mappings--;
  drop_block(block);
}

/* Device memory in one piece. 0 if there is too little. */
static uintptr_t allocate(size_t size, int device, enum kind kind, CUcontext context) {
  size_t whole = (size + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
  if (!size || memory_used[device] + whole > device_memory) return 0;
  uintptr_t at = reserve(whole, GRANULARITY);
  if (!at) return 0;
  struct block *block = new_block(whole, device, kind == MANAGED);
  map_block(at, whole, block, 0);
  add_range((struct range){.start = at,
                           .size = size,
                           .kind = kind,
                           .block = block,
                           .device = device,
                           .context = context,
                           .accessible = true});
  return at;
}

static bool release(uintptr_t start) {
  struct range *range = find_range(start);
  if (!range || range->start != start || (range->kind != ALLOCATED && range->kind != POOLED && range->kind != MANAGED))
    return false;
  struct block *block = range->block;
  size_t whole = block->size;
  remove_range(range);
  unmap_block(start, whole, block);
  unreserve(start);
  return true;
}

/* Why `size` bytes at a device address cannot be used, or NULL. */
static const char *unusable(uintptr_t address, size_t size) {
  if (!in_arena(address)) return address < 4096 ? "a null pointer" : NULL;
  while (size) {
    struct range *range = find_range(address);
    if (!range) return "not mapped";
    if (!range->accessible) return "mapped without access (cuMemSetAccess)";
    size_t here = range->start + range->size - address;
    if (here >= size) break;
    size -= here;
    address += here;
  }
  return NULL;
}

/* Is this the host's memory, and pageable? */
static bool pageable(uintptr_t address) { return !in_arena(address) && !find_range(address); }

/* ---------------------------------------------------------------- streams */

struct op {
  struct op *next;
  void (*run)(struct op *); /* without the lock */
  const char *name;
  uintptr_t to, from;
  size_t width, height, to_pitch, from_pitch;
  unsigned value, value_size;
  struct CUevent_st *event;
  struct CUstream_st *stream; /* to wait for */
  uint64_t number;
  CUhostFn function;
  CUstreamCallback callback;
  void *data;  /* the user's */
  void *owned; /* freed afterwards */
  struct launch *launch;
};

struct CUstream_st {
  CUcontext context;
  unsigned flags;
  int priority;
  unsigned long long id;
  bool closed;
  pthread_cond_t wake;
  struct op *first, *last;
  uint64_t submitted, completed;
  struct CUstream_st *next; /* of all; streams are never freed, so that use after destruction is seen */
};

static struct CUstream_st *streams;

struct CUevent_st {
  unsigned flags;
  bool closed;
  CUcontext context;
  uint64_t recorded, done; /* numbers of recordings */
  struct timespec when;
};

static void pause_randomly(unsigned *seed) {
  if (!delay_us) return;
  long nanoseconds = (long)(rand_r(seed) % (delay_us + 1)) * 1000;
  struct timespec time = {nanoseconds / 1000000000, nanoseconds % 1000000000};
  nanosleep(&time, NULL);
}

static void *stream_thread(void *argument) {
  struct CUstream_st *stream = argument;
  unsigned seed = (unsigned)setting("SIMULATOR_SEED", getpid()) * 31 + (unsigned)stream->id;
  pthread_mutex_lock(&lock);
  for (;;) {
    while (!stream->first && !stream->closed) pthread_cond_wait(&stream->wake, &lock);
    struct op *op = stream->first;
    if (!op) break;
    pthread_mutex_unlock(&lock);
    pause_randomly(&seed);
    if (trace_level >= 3) say("  stream %llu: %s", stream->id, op->name);
    op->run(op);
    free(op->owned);
    pthread_mutex_lock(&lock);
    stream->first = op->next;
    if (!stream->first) stream->last = NULL;
    stream->completed++;
    pthread_cond_broadcast(&progress);
    free(op);
  }
  pthread_mutex_unlock(&lock);
  return NULL;
}

static struct CUstream_st *new_stream(CUcontext context, unsigned flags, int priority) {
  struct CUstream_st *stream = calloc(1, sizeof *stream);
  stream->context = context;
  stream->flags = flags;
  stream->priority = priority;
  stream->id = next_id++;
  pthread_cond_init(&stream->wake, NULL);
  stream->next = streams;
  streams = stream;
  pthread_t thread;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  if (pthread_create(&thread, &attributes, stream_thread, stream) != 0) DIE("no thread for a stream");
  pthread_attr_destroy(&attributes);
  return stream;
}

static void wait_until(struct CUstream_st *stream, uint64_t number) {
  while (stream->completed < number) pthread_cond_wait(&progress, &lock);
}

/* The stream that a handle means; the lock is held. */
static struct CUstream_st *stream_of(CUstream handle, const char *where) {
  if (handle == NULL || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD) {
    CUcontext context = current();
    if (!context) return NULL;
    if (!context->legacy) context->legacy = new_stream(context, 0, 0);
    return context->legacy;
  }
  if (handle->closed) DIE("%s: a stream that has been destroyed", where);
  return handle;
}

static void append(struct CUstream_st *stream, struct op *op) {
  op->next = NULL;
  if (stream->last)
    stream->last->next = op;
  else
    stream->first = op;
  stream->last = op;
  stream->submitted++;
  pthread_cond_signal(&stream->wake);
}

static void run_wait_stream(struct op *op) {
  pthread_mutex_lock(&lock);
  wait_until(op->stream, op->number);
  pthread_mutex_unlock(&lock);
}

static void wait_for_other(struct CUstream_st *stream, struct CUstream_st *other) {
  if (other == stream || other->completed == other->submitted) return;
  struct op *op = calloc(1, sizeof *op);
  *op = (struct op){.run = run_wait_stream, .name = "wait for a stream", .stream = other, .number = other->submitted};
  append(stream, op);
}

/* Queues an operation, behind what the default stream's rules say; the lock is held. */
static void submit(struct CUstream_st *stream, struct op operation) {
  struct CUstream_st *legacy = stream->context->legacy;
  if (stream == legacy) {
    for (struct CUstream_st *other = streams; other; other = other->next)
      if (other->context == stream->context && !(other->flags & CU_STREAM_NON_BLOCKING)) wait_for_other(stream, other);
  } else if (legacy && !(stream->flags & CU_STREAM_NON_BLOCKING)) {
    wait_for_other(stream, legacy);
  }
  struct op *op = malloc(sizeof *op);
  *op = operation;
  append(stream, op);
}

/* ---------------------------------------------------------------- copies */

static void must_be_usable(const struct op *op, uintptr_t address, size_t size, const char *side) {
  pthread_mutex_lock(&lock);
  const char *why = unusable(address, size);
  pthread_mutex_unlock(&lock);
  if (why) DIE("%s, %s: %zu bytes at %p are %s", op->name, side, size, (void *)address, why);
}

static void run_copy(struct op *op) {
  for (size_t row = 0; row < op->height; row++) {
    uintptr_t to = op->to + row * op->to_pitch, from = op->from + row * op->from_pitch;
    must_be_usable(op, to, op->width, "writing");
    must_be_usable(op, from, op->width, "reading");
    memmove(seen(to), seen(from), op->width);
  }
}

static void run_fill(struct op *op) {
  for (size_t row = 0; row < op->height; row++) {
    uintptr_t to = op->to + row * op->to_pitch;
    must_be_usable(op, to, op->width * op->value_size, "writing");
    char *memory = seen(to);
    if (op->value_size == 1) {
      memset(memory, (int)op->value, op->width);
    } else {
      for (size_t i = 0; i < op->width; i++) memcpy(memory + i * op->value_size, &op->value, op->value_size);
    }
  }
}

/* A copy in either direction; `synchronous` as in the functions without a stream. */
static CUresult copy(const char *name, uintptr_t to, size_t to_pitch, uintptr_t from, size_t from_pitch, size_t width,
                     size_t height, CUstream handle, bool synchronous) {
  CUresult entered = enter(name);
  if (entered != CUDA_SUCCESS) return entered;
  if (!current() && !handle) return fail(name, CUDA_ERROR_INVALID_CONTEXT, "no context is current");
  if (!width || !height) return CUDA_SUCCESS;
  pthread_mutex_lock(&lock);
  struct CUstream_st *stream = stream_of(handle, name);
  const char *bad_to = unusable(to, width), *bad_from = unusable(from, width);
  if (bad_to || bad_from) {
    pthread_mutex_unlock(&lock);
    say("ERROR: %s: %zu bytes to %p%s%s, from %p%s%s", name, width, (void *)to, bad_to ? ", which is " : "",
        bad_to ? bad_to : "", (void *)from, bad_from ? ", which is " : "", bad_from ? bad_from : "");
    return CUDA_ERROR_INVALID_VALUE;
  }
  struct op op = {.run = run_copy,
                  .name = name,
                  .to = to,
                  .from = from,
                  .width = width,
                  .height = height,
                  .to_pitch = to_pitch,
                  .from_pitch = from_pitch};
  bool wait = synchronous || pageable(to);
  if (!wait && pageable(from)) {
    /* The caller may change it as soon as this returns. */
    char *taken = malloc(width * height);
    for (size_t row = 0; row < height; row++) memcpy(taken + row * width, (char *)from + row * from_pitch, width);
    op.from = (uintptr_t)taken;
    op.from_pitch = width;
    op.owned = taken;
  }
  submit(stream, op);
  if (wait) wait_until(stream, stream->submitted);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

static CUresult copy_line(const char *name, uintptr_t to, uintptr_t from, size_t size, CUstream stream,
                          bool synchronous) {
  return copy(name, to, size, from, size, size, 1, stream, synchronous);
}

EXPORT CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t size) {
  return copy_line("cuMemcpy", to, from, size, NULL, true);
}
EXPORT CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t size) {
  return copy_line("cuMemcpyHtoD", to, (uintptr_t)from, size, NULL, true);
}
EXPORT CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t size) {
  return copy_line("cuMemcpyDtoH", (uintptr_t)to, from, size, NULL, true);
}
EXPORT CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t size) {
  /* Documented: copies within the device do not wait for the host. */
  return copy_line("cuMemcpyDtoD", to, from, size, NULL, false);
}
EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  return copy_line("cuMemcpyAsync", to, from, size, stream, false);
}
EXPORT CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
  return copy_line("cuMemcpyHtoDAsync", to, (uintptr_t)from, size, stream, false);
}
EXPORT CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) {
  return copy_line("cuMemcpyDtoHAsync", (uintptr_t)to, from, size, stream, false);
}
EXPORT CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  return copy_line("cuMemcpyDtoDAsync", to, from, size, stream, false);
}
EXPORT CUresult cuMemcpyPeer(CUdeviceptr to, UNUSED CUcontext to_context, CUdeviceptr from,
                             UNUSED CUcontext from_context, size_t size) {
  return copy_line("cuMemcpyPeer", to, from, size, NULL, false);
}
EXPORT CUresult cuMemcpyPeerAsync(CUdeviceptr to, UNUSED CUcontext to_context, CUdeviceptr from,
                                  UNUSED CUcontext from_context, size_t size, CUstream stream) {
  return copy_line("cuMemcpyPeerAsync", to, from, size, stream, false);
}

static CUresult copy_2d(const char *name, const CUDA_MEMCPY2D *p, CUstream stream, bool synchronous) {
  if (p->srcMemoryType == CU_MEMORYTYPE_ARRAY || p->dstMemoryType == CU_MEMORYTYPE_ARRAY)
    return fail(name, CUDA_ERROR_NOT_SUPPORTED, "arrays");
  uintptr_t from = p->srcMemoryType == CU_MEMORYTYPE_HOST ? (uintptr_t)p->srcHost : p->srcDevice;
  uintptr_t to = p->dstMemoryType == CU_MEMORYTYPE_HOST ? (uintptr_t)p->dstHost : p->dstDevice;
  from += p->srcY * p->srcPitch + p->srcXInBytes;
  to += p->dstY * p->dstPitch + p->dstXInBytes;
  return copy(name, to, p->dstPitch, from, p->srcPitch, p->WidthInBytes, p->Height, stream, synchronous);
}
EXPORT CUresult cuMemcpy2D(const CUDA_MEMCPY2D *p) { return copy_2d("cuMemcpy2D", p, NULL, true); }
EXPORT CUresult cuMemcpy2DUnaligned(const CUDA_MEMCPY2D *p) { return copy_2d("cuMemcpy2DUnaligned", p, NULL, true); }
EXPORT CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D *p, CUstream stream) {
  return copy_2d("cuMemcpy2DAsync", p, stream, false);
}

static CUresult fill(const char *name, uintptr_t to, size_t pitch, unsigned value, unsigned size, size_t width,
                     size_t height, CUstream handle) {
  CUresult entered = enter(name);
  if (entered != CUDA_SUCCESS) return entered;
  if (!current() && !handle) return fail(name, CUDA_ERROR_INVALID_CONTEXT, "no context is current");
  if (!width || !height) return CUDA_SUCCESS;
  pthread_mutex_lock(&lock);
  struct CUstream_st *stream = stream_of(handle, name);
  const char *bad = in_arena(to) ? unusable(to, width * size) : pageable(to) ? "pageable memory" : NULL;
  if (bad) {
    pthread_mutex_unlock(&lock);
    say("ERROR: %s: %zu bytes at %p are %s", name, width * size, (void *)to, bad);
    return CUDA_ERROR_INVALID_VALUE;
  }
  submit(stream, (struct op){.run = run_fill,
                             .name = name,
                             .to = to,
                             .to_pitch = pitch,
                             .value = value,
                             .value_size = size,
                             .width = width,
                             .height = height});
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

#define FILLS(bits, type)                                                                                         \
  EXPORT CUresult cuMemsetD##bits(CUdeviceptr to, type value, size_t count) {                                     \
    return fill("cuMemsetD" #bits, to, 0, value, bits / 8, count, 1, NULL);                                       \
  }                                                                                                               \
  EXPORT CUresult cuMemsetD##bits##Async(CUdeviceptr to, type value, size_t count, CUstream stream) {             \
    return fill("cuMemsetD" #bits "Async", to, 0, value, bits / 8, count, 1, stream);                             \
  }                                                                                                               \
  EXPORT CUresult cuMemsetD2D##bits(CUdeviceptr to, size_t pitch, type value, size_t width, size_t height) {      \
    return fill("cuMemsetD2D" #bits, to, pitch, value, bits / 8, width, height, NULL);                            \
  }                                                                                                               \
  EXPORT CUresult cuMemsetD2D##bits##Async(CUdeviceptr to, size_t pitch, type value, size_t width, size_t height, \
                                           CUstream stream) {                                                     \
    return fill("cuMemsetD2D" #bits "Async", to, pitch, value, bits / 8, width, height, stream);                  \
  }
FILLS(8, unsigned char)
FILLS(16, unsigned short)
FILLS(32, unsigned int)

/* ---------------------------------------------------------------- start, errors, entry points */

__attribute__((constructor)) static void load_settings(void) {
  trace_level = (int)setting("SIMULATOR_TRACE", 0);
  device_count = (int)setting("SIMULATOR_DEVICES", 1);
  if (device_count > MAX_DEVICES) device_count = MAX_DEVICES;
  device_memory = (size_t)setting("SIMULATOR_MEMORY", (long)80 << 30);
  device_fault = setting("SIMULATOR_DEVICE_FAULT", 1) != 0;
  delay_us = (unsigned)setting("SIMULATOR_DELAY_US", 0);
  dump_folder = getenv("SIMULATOR_DUMP");
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  if (visible) {
    int count = *visible && strcmp(visible, "-1") != 0;
    for (const char *p = visible; *p; p++) count += *p == ',';
    if (count < device_count) device_count = count;
  }
}

EXPORT CUresult cuInit(UNUSED unsigned flags) {
  ENTER;
  pthread_mutex_lock(&lock);
  if (!initialised) {
    make_arena();
    for (int i = 0; i < device_count; i++)
      primaries[i] = (struct CUctx_st){.device = i, .primary = true, .id = next_id++};
    initialised = true;
  }
  pthread_mutex_unlock(&lock);
  return device_count > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
  ENTER;
  *version = DRIVER_VERSION;
  return CUDA_SUCCESS;
}

static const struct {
  CUresult result;
  const char *name, *text;
} errors[] = {
#define ERROR(name, text) {name, #name, text}
    ERROR(CUDA_SUCCESS, "no error"),
    ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    ERROR(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed"),
    ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    ERROR(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "peer access is not supported between these two devices"),
    ERROR(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped"),
    ERROR(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region"),
    ERROR(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
};

EXPORT CUresult cuGetErrorName(CUresult error, const char **name) {
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i].result == error) return *name = errors[i].name, CUDA_SUCCESS;
  *name = NULL;
  return CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i].result == error) return *text = errors[i].text, CUDA_SUCCESS;
  *text = NULL;
  return CUDA_ERROR_INVALID_VALUE;
}

/* Our own function of that name, in its newest version. */
static void *entry_point(const char *name) {
  static void *self;
  Dl_info info;
  if (!self && dladdr((void *)entry_point, &info)) self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  static const char *const versions[] = {"_v4", "_v3", "_v2", ""};
  for (size_t i = 0; i < sizeof versions / sizeof *versions; i++) {
    char full[128];
    snprintf(full, sizeof full, "%s%s", name, versions[i]);
    void *found = dlsym(self, full);
    if (found) return found;
  }
  return NULL;
}

EXPORT CUresult cuGetProcAddress(const char *name, void **function, UNUSED int version, UNUSED cuuint64_t flags,
                                 CUdriverProcAddressQueryResult *status) {
  ENTER;
  *function = entry_point(name);
  if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  if (!*function) FAIL(CUDA_ERROR_NOT_FOUND, name);
  return CUDA_SUCCESS;
}
#undef cuGetProcAddress
EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags);
EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

EXPORT CUresult cuGetExportTable(UNUSED const void **table, const CUuuid *id) {
  ENTER;
  char text[33];
  for (int i = 0; i < 16; i++) snprintf(text + 2 * i, 3, "%02x", (unsigned char)id->bytes[i]);
  FAIL(CUDA_ERROR_NOT_SUPPORTED, text);
}

/* ---------------------------------------------------------------- devices */

EXPORT CUresult cuDeviceGetCount(int *count) {
  ENTER;
  if (!initialised) FAIL(CUDA_ERROR_NOT_INITIALIZED, "before cuInit");
  *count = device_count;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  ENTER;
  NEED_DEVICE(ordinal);
  *device = ordinal;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
  ENTER;
  NEED_DEVICE(device);
  snprintf(name, (size_t)size, "NVIDIA H100 80GB HBM3");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
  ENTER;
  NEED_DEVICE(device);
  memcpy(uuid->bytes, "simulator device0", 16);
  uuid->bytes[15] = (char)('0' + device);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
  ENTER;
  NEED_DEVICE(device);
  *bytes = device_memory;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
  ENTER;
  NEED_DEVICE(device);
  *major = 9;
  *minor = 0;
  return CUDA_SUCCESS;
}

/* Of an H100 SXM5; those that are not here are 0. */
static const struct {
  CUdevice_attribute attribute;
  int value;
} attributes[] = {
#define IS(name, value) {CU_DEVICE_ATTRIBUTE_##name, value}
    IS(MAX_THREADS_PER_BLOCK, 1024),
    IS(MAX_BLOCK_DIM_X, 1024),
    IS(MAX_BLOCK_DIM_Y, 1024),
    IS(MAX_BLOCK_DIM_Z, 64),
    IS(MAX_GRID_DIM_X, 2147483647),
    IS(MAX_GRID_DIM_Y, 65535),
    IS(MAX_GRID_DIM_Z, 65535),
    IS(MAX_SHARED_MEMORY_PER_BLOCK, 49152),
    IS(TOTAL_CONSTANT_MEMORY, 65536),
    IS(WARP_SIZE, 32),
    IS(MAX_PITCH, 2147483647),
    IS(MAX_REGISTERS_PER_BLOCK, 65536),
    IS(CLOCK_RATE, 1980000),
    IS(TEXTURE_ALIGNMENT, 512),
    IS(TEXTURE_PITCH_ALIGNMENT, 32),
    IS(SURFACE_ALIGNMENT, 512),
    IS(GPU_OVERLAP, 1),
    IS(MULTIPROCESSOR_COUNT, 132),
    IS(CAN_MAP_HOST_MEMORY, 1),
    IS(CONCURRENT_KERNELS, 1),
    IS(ECC_ENABLED, 1),
    IS(MEMORY_CLOCK_RATE, 2619000),
    IS(GLOBAL_MEMORY_BUS_WIDTH, 5120),
    IS(L2_CACHE_SIZE, 52428800),
    IS(MAX_THREADS_PER_MULTIPROCESSOR, 2048),
    IS(ASYNC_ENGINE_COUNT, 3),
    IS(UNIFIED_ADDRESSING, 1),
    IS(COMPUTE_CAPABILITY_MAJOR, 9),
    IS(COMPUTE_CAPABILITY_MINOR, 0),
    IS(STREAM_PRIORITIES_SUPPORTED, 1),
    IS(GLOBAL_L1_CACHE_SUPPORTED, 1),
    IS(LOCAL_L1_CACHE_SUPPORTED, 1),
    IS(MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472),
    IS(MAX_REGISTERS_PER_MULTIPROCESSOR, 65536),
    IS(MANAGED_MEMORY, 1),
    IS(SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO, 2),
    IS(CONCURRENT_MANAGED_ACCESS, 1),
    IS(COMPUTE_PREEMPTION_SUPPORTED, 1),
    IS(CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, 1),
    IS(COOPERATIVE_LAUNCH, 1),
    IS(CAN_USE_64_BIT_STREAM_MEM_OPS, 1),
    IS(CAN_USE_STREAM_WAIT_VALUE_NOR, 1),
    IS(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448),
    IS(HOST_REGISTER_SUPPORTED, 1),
    IS(VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 1),
    IS(HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, 1),
    IS(MAX_BLOCKS_PER_MULTIPROCESSOR, 32),
    IS(RESERVED_SHARED_MEMORY_PER_BLOCK, 1024),
    IS(READ_ONLY_HOST_REGISTER_SUPPORTED, 1),
    IS(MEMORY_POOLS_SUPPORTED, 1),
    IS(MEMPOOL_SUPPORTED_HANDLE_TYPES, 1),
    IS(CLUSTER_LAUNCH, 1),
    IS(UNIFIED_FUNCTION_POINTERS, 1),
    IS(NUMA_ID, -1),
    IS(HOST_NUMA_ID, 0),
};

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  ENTER;
  NEED_DEVICE(device);
  *value = 0;
  if (attribute == CU_DEVICE_ATTRIBUTE_PCI_BUS_ID) *value = 0x18 + device;
  for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
    if (attributes[i].attribute == attribute) *value = attributes[i].value;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetPCIBusId(char *id, int size, CUdevice device) {
  ENTER;
  NEED_DEVICE(device);
  snprintf(id, (size_t)size, "0000:%02X:00.0", 0x18 + device);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetByPCIBusId(CUdevice *device, const char *id) {
  ENTER;
  const char *bus = strchr(id, ':');
  *device = bus ? (int)strtol(bus + 1, NULL, 16) - 0x18 : -1;
  NEED_DEVICE(*device);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
  ENTER;
  NEED_DEVICE(device);
  NEED_DEVICE(peer);
  *can = device != peer;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetP2PAttribute(int *value, CUdevice_P2PAttribute attribute, CUdevice device, CUdevice peer) {
  ENTER;
  NEED_DEVICE(device);
  NEED_DEVICE(peer);
  *value = attribute == CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetExecAffinitySupport(int *value, UNUSED CUexecAffinityType type, UNUSED CUdevice device) {
  ENTER;
  *value = 0;
  return CUDA_SUCCESS;
}

/* ---------------------------------------------------------------- contexts' functions */

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  ENTER;
  NEED_DEVICE(device);
  pthread_mutex_lock(&lock);
  primaries[device].retained++;
  pthread_mutex_unlock(&lock);
  *context = &primaries[device];
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  ENTER;
  NEED_DEVICE(device);
  pthread_mutex_lock(&lock);
  if (primaries[device].retained) primaries[device].retained--;
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  ENTER;
  NEED_DEVICE(device);
  *flags = primaries[device].flags;
  *active = primaries[device].retained > 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxSetFlags(CUdevice device, unsigned flags) {
  ENTER;
  NEED_DEVICE(device);
  primaries[device].flags = flags;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxCreate_v2(CUcontext *context, unsigned flags, CUdevice device) {
  ENTER;
  NEED_DEVICE(device);
  struct CUctx_st *made = calloc(1, sizeof *made);
  *made = (struct CUctx_st){.device = device, .flags = flags, .id = next_id++};
  context_stack[context_depth++] = *context = made;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxCreate(CUcontext *context, UNUSED CUctxCreateParams *parameters, unsigned flags, CUdevice device) {
  return cuCtxCreate_v2(context, flags, device);
}
EXPORT CUresult cuCtxDestroy(CUcontext context) {
  ENTER;
  if (current() == context) context_depth--;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  ENTER;
  if (context_depth) context_depth--;
  if (context) context_stack[context_depth++] = context;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
  ENTER;
  *context = current();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPushCurrent(CUcontext context) {
  ENTER;
  if (!context || context_depth == 64) FAIL(CUDA_ERROR_INVALID_CONTEXT, "none, or too many");
  context_stack[context_depth++] = context;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxPopCurrent(CUcontext *context) {
  ENTER;
  NEED_CONTEXT;
  context_depth--;
  if (context) *context = context_stack[context_depth];
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
  ENTER;
  NEED_CONTEXT;
  *device = current()->device;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetFlags(unsigned *flags) {
  ENTER;
  NEED_CONTEXT;
  *flags = current()->flags;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetFlags(unsigned flags) {
  ENTER;
  NEED_CONTEXT;
  current()->flags = flags;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetId(CUcontext context, unsigned long long *id) {
  ENTER;
  if (!context) context = current();
  if (!context) FAIL(CUDA_ERROR_INVALID_CONTEXT, "no context is current");
  *id = context->id;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetApiVersion(UNUSED CUcontext context, unsigned *version) {
  ENTER;
  *version = DRIVER_VERSION;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  ENTER;
  NEED_CONTEXT;
  *value = (unsigned)limit < 16 ? current()->limits[limit] : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  ENTER;
  NEED_CONTEXT;
  if ((unsigned)limit < 16) current()->limits[limit] = value;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCacheConfig(CUfunc_cache *config) {
  ENTER;
  *config = CU_FUNC_CACHE_PREFER_NONE;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCacheConfig(UNUSED CUfunc_cache config) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  ENTER;
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxEnablePeerAccess(UNUSED CUcontext peer, UNUSED unsigned flags) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxDisablePeerAccess(UNUSED CUcontext peer) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSynchronize(void) {
  ENTER;
  NEED_CONTEXT;
  pthread_mutex_lock(&lock);
  for (struct CUstream_st *stream = streams; stream; stream = stream->next)
    if (stream->context == current()) wait_until(stream, stream->submitted);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

/* ---------------------------------------------------------------- memory's functions */

EXPORT CUresult cuMemGetInfo(size_t *free_bytes, size_t *total) {
  ENTER;
  NEED_CONTEXT;
  pthread_mutex_lock(&lock);
  *total = device_memory;
  *free_bytes = device_memory - memory_used[current()->device];
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

static CUresult allocate_for_user(const char *name, CUdeviceptr *pointer, size_t size, enum kind kind) {
  if (!current()) return fail(name, CUDA_ERROR_INVALID_CONTEXT, "no context is current");
  if (!size) return fail(name, CUDA_ERROR_INVALID_VALUE, "no bytes");
  pthread_mutex_lock(&lock);
  *pointer = allocate(size, current()->device, kind, current());
  pthread_mutex_unlock(&lock);
  return *pointer ? CUDA_SUCCESS : fail(name, CUDA_ERROR_OUT_OF_MEMORY, "too much");
}
EXPORT CUresult cuMemAlloc(CUdeviceptr *pointer, size_t size) {
  ENTER;
  return allocate_for_user(__func__, pointer, size, ALLOCATED);
}
EXPORT CUresult cuMemAllocManaged(CUdeviceptr *pointer, size_t size, UNUSED unsigned flags) {
  ENTER;
  return allocate_for_user(__func__, pointer, size, MANAGED);
}
EXPORT CUresult cuMemFree(CUdeviceptr pointer) {
  ENTER;
  if (!pointer) return CUDA_SUCCESS;
  NEED_CONTEXT;
  pthread_mutex_lock(&lock);
  /* Documented: frees wait for everything on the device. */
  for (struct CUstream_st *stream = streams; stream; stream = stream->next)
    if (stream->context == current()) wait_until(stream, stream->submitted);
  bool done = release(pointer);
  pthread_mutex_unlock(&lock);
  if (!done) FAIL(CUDA_ERROR_INVALID_VALUE, "not from cuMemAlloc");
  return CUDA_SUCCESS;
}

/* Pools: memory comes at once and goes in the stream's order. */
static char default_pool;
EXPORT CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice device) {
  ENTER;
  NEED_DEVICE(device);
  *pool = (CUmemoryPool)&default_pool;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice device) {
  ENTER;
  NEED_DEVICE(device);
  *pool = (CUmemoryPool)&default_pool;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceSetMemPool(UNUSED CUdevice device, UNUSED CUmemoryPool pool) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolCreate(CUmemoryPool *pool, UNUSED const CUmemPoolProps *properties) {
  ENTER;
  *pool = (CUmemoryPool)&default_pool;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolDestroy(UNUSED CUmemoryPool pool) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolSetAttribute(UNUSED CUmemoryPool pool, UNUSED CUmemPool_attribute attribute,
                                      UNUSED void *value) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolGetAttribute(UNUSED CUmemoryPool pool, CUmemPool_attribute attribute, void *value) {
  ENTER;
  if (attribute <= CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES)
    *(int *)value = 1;
  else
    *(cuuint64_t *)value = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolTrimTo(UNUSED CUmemoryPool pool, UNUSED size_t bytes) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemPoolSetAccess(UNUSED CUmemoryPool pool, UNUSED const CUmemAccessDesc *map, UNUSED size_t count) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemAllocAsync(CUdeviceptr *pointer, size_t size, UNUSED CUstream stream) {
  ENTER;
  return allocate_for_user(__func__, pointer, size, POOLED);
}
EXPORT CUresult cuMemAllocFromPoolAsync(CUdeviceptr *pointer, size_t size, UNUSED CUmemoryPool pool,
                                        UNUSED CUstream stream) {
  ENTER;
  return allocate_for_user(__func__, pointer, size, POOLED);
}
static void run_free(struct op *op) {
  pthread_mutex_lock(&lock);
  if (!release(op->to)) DIE("cuMemFreeAsync: %p is not allocated", (void *)op->to);
  pthread_mutex_unlock(&lock);
}
EXPORT CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream handle) {
  ENTER;
  if (!pointer) return CUDA_SUCCESS;
  pthread_mutex_lock(&lock);
  submit(stream_of(handle, __func__), (struct op){.run = run_free, .name = __func__, .to = pointer});
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

/* Virtual memory: what XLA takes its memory from. */
static struct block *block_of(CUmemGenericAllocationHandle handle) { return (struct block *)(uintptr_t)handle; }

EXPORT CUresult cuMemGetAllocationGranularity(size_t *size, UNUSED const CUmemAllocationProp *properties,
                                              UNUSED CUmemAllocationGranularity_flags option) {
  ENTER;
  *size = GRANULARITY;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *properties,
                            UNUSED unsigned long long flags) {
  ENTER;
  bool of_host = properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE;
  int device = of_host ? 0 : properties->location.id;
  NEED_DEVICE(device);
  if (trace_level >= 2) say("  %zu bytes, handle types %d", size, (int)properties->requestedHandleTypes);
  if (!size || size % GRANULARITY) FAIL(CUDA_ERROR_INVALID_VALUE, "not a multiple of the granularity");
  if (properties->requestedHandleTypes & ~CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
    FAIL(CUDA_ERROR_NOT_SUPPORTED, "handles other than file descriptors");
  pthread_mutex_lock(&lock);
  bool fits = of_host || memory_used[device] + size <= device_memory;
  struct block *block = fits ? new_block(size, device, of_host) : NULL;
  if (block) {
    block->properties = *properties;
    block->handles = 1;
  }
  pthread_mutex_unlock(&lock);
  if (!block) FAIL(CUDA_ERROR_OUT_OF_MEMORY, "too much");
  *handle = (uintptr_t)block;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  ENTER;
  pthread_mutex_lock(&lock);
  block_of(handle)->handles--;
  drop_block(block_of(handle));
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemAddressReserve(CUdeviceptr *pointer, size_t size, size_t alignment, UNUSED CUdeviceptr wish,
                                    UNUSED unsigned long long flags) {
  ENTER;
  if (!initialised) FAIL(CUDA_ERROR_NOT_INITIALIZED, "before cuInit");
  if (!size || size % GRANULARITY) FAIL(CUDA_ERROR_INVALID_VALUE, "not a multiple of the granularity");
  pthread_mutex_lock(&lock);
  *pointer = reserve(size, alignment);
  pthread_mutex_unlock(&lock);
  if (!*pointer) FAIL(CUDA_ERROR_OUT_OF_MEMORY, "no addresses");
  if (trace_level >= 2) say("  %zu bytes at %p", size, (void *)(uintptr_t)*pointer);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemAddressFree(CUdeviceptr pointer, UNUSED size_t size) {
  ENTER;
  pthread_mutex_lock(&lock);
  bool found = unreserve(pointer);
  pthread_mutex_unlock(&lock);
  if (!found) FAIL(CUDA_ERROR_INVALID_VALUE, "not reserved");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemMap(CUdeviceptr pointer, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                         UNUSED unsigned long long flags) {
  ENTER;
  struct block *block = block_of(handle);
  if (!in_arena(pointer) || offset + size > block->size) FAIL(CUDA_ERROR_INVALID_VALUE, "out of bounds");
  pthread_mutex_lock(&lock);
  bool taken = false;
  for (size_t i = 0; i < range_count; i++)
    taken |= ranges[i].start < pointer + size && pointer < ranges[i].start + ranges[i].size;
  if (!taken) {
    map_block(pointer, size, block, offset);
    add_range((struct range){.start = pointer,
                             .size = size,
                             .kind = MAPPED,
                             .block = block,
                             .offset = offset,
                             .device = block->device,
                             .context = &primaries[block->device]});
  }
  pthread_mutex_unlock(&lock);
  if (taken) FAIL(CUDA_ERROR_INVALID_VALUE, "mapped already");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemUnmap(CUdeviceptr pointer, size_t size) {
  ENTER;
  pthread_mutex_lock(&lock);
  bool found = false;
  for (size_t i = range_count; i-- > 0;) {
    struct range range = ranges[i];
    if (range.kind != MAPPED || range.start < pointer || range.start + range.size > pointer + size) continue;
    remove_range(&ranges[i]);
    unmap_block(range.start, range.size, range.block);
    found = true;
  }
  pthread_mutex_unlock(&lock);
  if (!found) FAIL(CUDA_ERROR_INVALID_VALUE, "nothing is mapped there");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemSetAccess(CUdeviceptr pointer, size_t size, const CUmemAccessDesc *access, size_t count) {
  ENTER;
  pthread_mutex_lock(&lock);
  bool found = false;
  for (size_t i = 0; i < range_count; i++) {
    if (ranges[i].kind != MAPPED || ranges[i].start < pointer || ranges[i].start + ranges[i].size > pointer + size)
      continue;
    for (size_t j = 0; j < count; j++)
      if (access[j].location.type != CU_MEM_LOCATION_TYPE_DEVICE || access[j].location.id == ranges[i].device)
        ranges[i].accessible = access[j].flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    found = true;
  }
  pthread_mutex_unlock(&lock);
  if (!found) FAIL(CUDA_ERROR_INVALID_VALUE, "nothing is mapped there");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemGetAccess(unsigned long long *flags, UNUSED const CUmemLocation *location, CUdeviceptr pointer) {
  ENTER;
  pthread_mutex_lock(&lock);
  struct range *range = find_range(pointer);
  *flags = range && range->accessible ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_NONE;
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *address) {
  ENTER;
  pthread_mutex_lock(&lock);
  struct range *range = find_range((uintptr_t)address);
  bool found = range && range->kind == MAPPED;
  if (found) {
    range->block->handles++;
    *handle = (uintptr_t)range->block;
  }
  pthread_mutex_unlock(&lock);
  if (!found) FAIL(CUDA_ERROR_INVALID_VALUE, "not mapped by cuMemMap");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *properties,
                                                       CUmemGenericAllocationHandle handle) {
  ENTER;
  *properties = block_of(handle)->properties;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemExportToShareableHandle(void *shared, CUmemGenericAllocationHandle handle,
                                             CUmemAllocationHandleType type, UNUSED unsigned long long flags) {
  ENTER;
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) FAIL(CUDA_ERROR_NOT_SUPPORTED, "this type of handle");
  if (!(block_of(handle)->properties.requestedHandleTypes & type))
    FAIL(CUDA_ERROR_INVALID_VALUE, "made without that type of handle");
  *(int *)shared = dup(block_of(handle)->file);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *shared,
                                               CUmemAllocationHandleType type) {
  ENTER;
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) FAIL(CUDA_ERROR_NOT_SUPPORTED, "this type of handle");
  int file = dup((int)(intptr_t)shared);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) FAIL(CUDA_ERROR_INVALID_VALUE, "not a file descriptor");
  struct block *block = calloc(1, sizeof *block);
  *block = (struct block){.file = file, .size = (size_t)status.st_size, .handles = 1};
  block->properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  block->properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  block->properties.requestedHandleTypes = type;
  pthread_mutex_lock(&lock);
  memory_used[0] += block->size;
  pthread_mutex_unlock(&lock);
  *handle = (uintptr_t)block;
  return CUDA_SUCCESS;
}

/* Memory of the host. */
EXPORT CUresult cuMemHostAlloc(void **memory, size_t size, unsigned flags) {
  ENTER;
  NEED_CONTEXT;
  if (!size) FAIL(CUDA_ERROR_INVALID_VALUE, "no bytes");
  size_t whole = (size + 4095) / 4096 * 4096;
  *memory = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (*memory == MAP_FAILED) FAIL(CUDA_ERROR_OUT_OF_MEMORY, "mmap");
  if (trace_level >= 2) say("  %zu bytes, flags %u", size, flags);
  pthread_mutex_lock(&lock);
  add_range((struct range){.start = (uintptr_t)*memory,
                           .size = size,
                           .kind = HOST_ALLOCATED,
                           .device = current()->device,
                           .context = current(),
                           .flags = flags,
                           .accessible = true});
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemAllocHost(void **memory, size_t size) { return cuMemHostAlloc(memory, size, 0); }
EXPORT CUresult cuMemFreeHost(void *memory) {
  ENTER;
  pthread_mutex_lock(&lock);
  struct range *range = find_range((uintptr_t)memory);
  bool found = range && range->kind == HOST_ALLOCATED && range->start == (uintptr_t)memory;
  size_t size = 0;
  if (found) {
    for (struct CUstream_st *stream = streams; stream; stream = stream->next) wait_until(stream, stream->submitted);
    range = find_range((uintptr_t)memory);
    size = range->size;
    remove_range(range);
  }
  pthread_mutex_unlock(&lock);
  if (!found) FAIL(CUDA_ERROR_INVALID_VALUE, "not from cuMemHostAlloc");
  munmap(memory, (size + 4095) / 4096 * 4096);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostRegister(void *memory, size_t size, unsigned flags) {
  ENTER;
  NEED_CONTEXT;
  pthread_mutex_lock(&lock);
  uintptr_t start = (uintptr_t)memory;
  bool taken = false;
  for (size_t i = 0; i < range_count; i++)
    taken |= ranges[i].start < start + size && start < ranges[i].start + ranges[i].size;
  if (!taken)
    add_range((struct range){.start = start,
                             .size = size,
                             .kind = HOST_REGISTERED,
                             .device = current()->device,
                             .context = current(),
                             .flags = flags,
                             .accessible = true});
  pthread_mutex_unlock(&lock);
  if (taken) FAIL(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "overlaps");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostUnregister(void *memory) {
  ENTER;
  pthread_mutex_lock(&lock);
  struct range *range = find_range((uintptr_t)memory);
  bool found = range && range->kind == HOST_REGISTERED && range->start == (uintptr_t)memory;
  if (found) remove_range(range);
  pthread_mutex_unlock(&lock);
  if (!found) FAIL(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "not registered");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostGetDevicePointer(CUdeviceptr *pointer, void *memory, UNUSED unsigned flags) {
  ENTER;
  pthread_mutex_lock(&lock);
  bool found = find_range((uintptr_t)memory) != NULL;
  pthread_mutex_unlock(&lock);
  if (!found) FAIL(CUDA_ERROR_INVALID_VALUE, "memory that the driver does not know");
  *pointer = (uintptr_t)memory;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuMemHostGetFlags(unsigned *flags, void *memory) {
  ENTER;
  pthread_mutex_lock(&lock);
  struct range *range = find_range((uintptr_t)memory);
  if (range) *flags = range->flags;
  pthread_mutex_unlock(&lock);
  if (!range) FAIL(CUDA_ERROR_INVALID_VALUE, "memory that the driver does not know");
  return CUDA_SUCCESS;
}

/* What is known of a pointer. */
EXPORT CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *size, CUdeviceptr pointer) {
  ENTER;
  pthread_mutex_lock(&lock);
  struct range *range = find_range(pointer);
  if (range && base) *base = range->start;
  if (range && size) *size = range->size;
  pthread_mutex_unlock(&lock);
  if (!range) FAIL(CUDA_ERROR_NOT_FOUND, "memory that the driver does not know");
  return CUDA_SUCCESS;
}

static bool pointer_attribute(void *data, CUpointer_attribute attribute, uintptr_t pointer, const struct range *range) {
  bool of_host = range->kind == HOST_ALLOCATED || range->kind == HOST_REGISTERED;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      *(CUcontext *)data = range->kind == MAPPED ? NULL : range->context;
      break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned *)data = of_host || (range->block && range->block->of_host && range->kind == MAPPED)
                              ? CU_MEMORYTYPE_HOST
                              : CU_MEMORYTYPE_DEVICE;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      *(CUdeviceptr *)data = pointer;
      break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      *(void **)data = of_host || range->kind == MANAGED ? (void *)pointer : NULL;
      break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      *(unsigned long long *)data = range->id;
      break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      *(unsigned *)data = range->kind == MANAGED;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *(int *)data = range->device;
      break;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
      *(int *)data = range->kind == ALLOCATED;
      break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      *(CUdeviceptr *)data = range->start;
      break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      *(size_t *)data = range->size;
      break;
    case CU_POINTER_ATTRIBUTE_MAPPED:
      *(int *)data = 1;
      break;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
      *(unsigned long long *)data = range->block ? range->block->properties.requestedHandleTypes : 0;
      break;
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
      *(int *)data = 0;
      break;
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
      *(int *)data = CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE;
      break;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      *(void **)data = range->kind == POOLED ? &default_pool : NULL;
      break;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
      *(int *)data = 0;
      break;
    default:
      return false;
  }
  return true;
}

static size_t size_of_attribute(CUpointer_attribute attribute) {
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      return 8;
    default:
      return 4;
  }
}

EXPORT CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  ENTER;
  pthread_mutex_lock(&lock);
  struct range *range = find_range(pointer);
  bool known = range && pointer_attribute(data, attribute, pointer, range);
  pthread_mutex_unlock(&lock);
  if (!range) FAIL(CUDA_ERROR_INVALID_VALUE, "memory that the driver does not know");
  if (!known) FAIL(CUDA_ERROR_NOT_SUPPORTED, "this attribute");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *wanted, void **data, CUdeviceptr pointer) {
  ENTER;
  pthread_mutex_lock(&lock);
  struct range *range = find_range(pointer);
  for (unsigned i = 0; i < count; i++) {
    /* Of other memory the driver says so by zeros, and no error. */
    if (!range || !pointer_attribute(data[i], wanted[i], pointer, range))
      memset(data[i], 0, size_of_attribute(wanted[i]));
    if (!range && wanted[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) *(int *)data[i] = -2;
  }
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerSetAttribute(UNUSED const void *value, UNUSED CUpointer_attribute attribute,
                                      UNUSED CUdeviceptr pointer) {
  ENTER;
  return CUDA_SUCCESS;
}

/* ---------------------------------------------------------------- streams' and events' functions */

EXPORT CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
  ENTER;
  NEED_CONTEXT;
  pthread_mutex_lock(&lock);
  *stream = new_stream(current(), flags, priority);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
  return cuStreamCreateWithPriority(stream, flags, 0);
}

#define WITH_STREAM(handle)                                    \
  ENTER;                                                       \
  pthread_mutex_lock(&lock);                                   \
  struct CUstream_st *stream = stream_of(handle, __func__);    \
  if (!stream) {                                               \
    pthread_mutex_unlock(&lock);                               \
    FAIL(CUDA_ERROR_INVALID_CONTEXT, "no context is current"); \
  }

EXPORT CUresult cuStreamDestroy(CUstream handle) {
  WITH_STREAM(handle);
  stream->closed = true;
  pthread_cond_signal(&stream->wake);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamSynchronize(CUstream handle) {
  WITH_STREAM(handle);
  if (stream == stream->context->legacy)
    submit(stream, (struct op){.run = run_wait_stream, .name = __func__, .stream = stream});
  wait_until(stream, stream->submitted);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamQuery(CUstream handle) {
  WITH_STREAM(handle);
  bool ready = stream->completed == stream->submitted;
  pthread_mutex_unlock(&lock);
  return ready ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
EXPORT CUresult cuStreamGetCtx(CUstream handle, CUcontext *context) {
  WITH_STREAM(handle);
  *context = stream->context;
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetFlags(CUstream handle, unsigned *flags) {
  WITH_STREAM(handle);
  *flags = stream->flags;
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetPriority(CUstream handle, int *priority) {
  WITH_STREAM(handle);
  *priority = stream->priority;
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamGetId(CUstream handle, unsigned long long *id) {
  WITH_STREAM(handle);
  *id = stream->id;
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
  WITH_STREAM(handle);
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
  ENTER;
  *mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  return CUDA_SUCCESS;
}

static void run_host_function(struct op *op) {
  inside_host_function = op->name;
  if (op->function)
    op->function(op->data);
  else
    op->callback((CUstream)op->stream, CUDA_SUCCESS, op->data);
  inside_host_function = NULL;
}
EXPORT CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void *data) {
  WITH_STREAM(handle);
  submit(stream, (struct op){.run = run_host_function, .name = __func__, .function = function, .data = data});
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamAddCallback(CUstream handle, CUstreamCallback callback, void *data, UNUSED unsigned flags) {
  WITH_STREAM(handle);
  submit(stream,
         (struct op){.run = run_host_function, .name = __func__, .callback = callback, .data = data, .stream = handle});
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

/* Values in memory that streams write or wait for. */
static void run_write_value(struct op *op) {
  must_be_usable(op, op->to, op->value_size, "writing");
  if (op->value_size == 4)
    __atomic_store_n((uint32_t *)seen(op->to), (uint32_t)op->number, __ATOMIC_SEQ_CST);
  else
    __atomic_store_n((uint64_t *)seen(op->to), op->number, __ATOMIC_SEQ_CST);
}
static CUresult write_value(const char *name, CUstream handle, CUdeviceptr to, uint64_t value, unsigned size) {
  CUresult entered = enter(name);
  if (entered != CUDA_SUCCESS) return entered;
  pthread_mutex_lock(&lock);
  submit(stream_of(handle, name),
         (struct op){.run = run_write_value, .name = name, .to = to, .number = value, .value_size = size});
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamWriteValue32(CUstream stream, CUdeviceptr to, cuuint32_t value, UNUSED unsigned flags) {
  return write_value("cuStreamWriteValue32", stream, to, value, 4);
}
EXPORT CUresult cuStreamWriteValue64(CUstream stream, CUdeviceptr to, cuuint64_t value, UNUSED unsigned flags) {
  return write_value("cuStreamWriteValue64", stream, to, value, 8);
}

EXPORT CUresult cuEventCreate(CUevent *event, unsigned flags) {
  ENTER;
  NEED_CONTEXT;
  struct CUevent_st *made = calloc(1, sizeof *made);
  made->flags = flags;
  made->context = current();
  *event = made;
  return CUDA_SUCCESS;
}
static void check_event(CUevent event, const char *where) {
  if (!event || event->closed) DIE("%s: an event that has been destroyed", where);
}
EXPORT CUresult cuEventDestroy(CUevent event) {
  ENTER;
  check_event(event, __func__);
  /* Not freed: operations may refer to it, and use after destruction is to be seen. */
  event->closed = true;
  return CUDA_SUCCESS;
}
static void run_record(struct op *op) {
  pthread_mutex_lock(&lock);
  struct CUevent_st *event = op->event;
  if (op->number > event->done) event->done = op->number;
  clock_gettime(CLOCK_MONOTONIC, &event->when);
  pthread_cond_broadcast(&progress);
  pthread_mutex_unlock(&lock);
}
EXPORT CUresult cuEventRecord(CUevent event, CUstream handle) {
  WITH_STREAM(handle);
  check_event(event, __func__);
  submit(stream, (struct op){.run = run_record, .name = __func__, .event = event, .number = ++event->recorded});
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, UNUSED unsigned flags) {
  return cuEventRecord(event, stream);
}
static void run_wait_event(struct op *op) {
  pthread_mutex_lock(&lock);
  while (op->event->done < op->number) pthread_cond_wait(&progress, &lock);
  pthread_mutex_unlock(&lock);
}
EXPORT CUresult cuStreamWaitEvent(CUstream handle, CUevent event, UNUSED unsigned flags) {
  WITH_STREAM(handle);
  check_event(event, __func__);
  if (event->done < event->recorded)
    submit(stream, (struct op){.run = run_wait_event, .name = __func__, .event = event, .number = event->recorded});
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventQuery(CUevent event) {
  ENTER;
  check_event(event, __func__);
  pthread_mutex_lock(&lock);
  bool ready = event->done == event->recorded;
  pthread_mutex_unlock(&lock);
  return ready ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
EXPORT CUresult cuEventSynchronize(CUevent event) {
  ENTER;
  check_event(event, __func__);
  pthread_mutex_lock(&lock);
  uint64_t number = event->recorded;
  while (event->done < number) pthread_cond_wait(&progress, &lock);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
  ENTER;
  check_event(start, __func__);
  check_event(end, __func__);
  if ((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING) FAIL(CUDA_ERROR_INVALID_HANDLE, "an event without time");
  pthread_mutex_lock(&lock);
  bool ready = start->done && end->done && start->done == start->recorded && end->done == end->recorded;
  *milliseconds = (float)((double)(end->when.tv_sec - start->when.tv_sec) * 1e3 +
                          (double)(end->when.tv_nsec - start->when.tv_nsec) * 1e-6);
  pthread_mutex_unlock(&lock);
  return ready ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

/* ---------------------------------------------------------------- modules and kernels */

struct CUfunc_st {
  char *name;
  struct CUmod_st *module;
  const struct ptx_kernel *kernel; /* NULL: cannot run */
  const char *why;                 /* then */
  struct CUfunc_st *next;
};

struct global {
  char *name;
  CUdeviceptr address;
  size_t size;
  struct global *next;
};

struct CUmod_st {
  char *image;
  size_t size;
  bool is_elf;
  struct ptx_module *ptx; /* NULL: machine code, or not understood */
  char why[256];          /* then */
  struct CUfunc_st *functions;
  struct global *globals;
};

/* Of machine code (ELF) or the null-terminated text of PTX. */
static size_t image_size(const char *image, bool *is_elf) {
  *is_elf = memcmp(image, ELFMAG, SELFMAG) == 0;
  if (!*is_elf) return strlen(image) + 1;
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  size_t size = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  size_t programs = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
  if (programs > size) size = programs;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  for (int i = 0; i < header->e_shnum; i++)
    if (sections[i].sh_type != SHT_NOBITS && sections[i].sh_offset + sections[i].sh_size > size)
      size = sections[i].sh_offset + sections[i].sh_size;
  return size;
}

/* A symbol of machine code. */
static const Elf64_Sym *elf_symbol(const struct CUmod_st *module, const char *name, const char **content) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)module->image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(module->image + header->e_shoff);
  for (int i = 0; i < header->e_shnum; i++) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const Elf64_Sym *symbols = (const Elf64_Sym *)(module->image + sections[i].sh_offset);
    const char *names = module->image + sections[sections[i].sh_link].sh_offset;
    for (size_t j = 0; j < sections[i].sh_size / sizeof *symbols; j++) {
      if (strcmp(names + symbols[j].st_name, name) != 0) continue;
      *content = NULL;
      if (symbols[j].st_shndx < header->e_shnum) {
        const Elf64_Shdr *home = &sections[symbols[j].st_shndx];
        if (home->sh_type != SHT_NOBITS) *content = module->image + home->sh_offset + symbols[j].st_value;
      }
      return &symbols[j];
    }
  }
  return NULL;
}

static void dump(const struct CUmod_st *module) {
  static _Atomic int number;
  char path[512];
  snprintf(path, sizeof path, "%s/module-%d-%03d.%s", dump_folder, (int)getpid(), number++,
           module->is_elf ? "cubin" : "ptx");
  int file = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0666);
  if (file < 0 || write(file, module->image, module->size) < 0) say("cannot write %s", path);
  if (file >= 0) close(file);
}

static uintptr_t allocate_global(void *user, const char *name, size_t size, const void *content) {
  struct CUmod_st *module = user;
  struct global *global = calloc(1, sizeof *global);
  global->name = strdup(name);
  global->size = size;
  pthread_mutex_lock(&lock);
  global->address = allocate(size ? size : 1, current()->device, ALLOCATED, current());
  if (!global->address) DIE("no memory for %s", name);
  if (content) memcpy(seen(global->address), content, size);
  pthread_mutex_unlock(&lock);
  global->next = module->globals;
  module->globals = global;
  return global->address;
}

EXPORT CUresult cuModuleLoadData(CUmodule *handle, const void *image) {
  ENTER;
  NEED_CONTEXT;
  struct CUmod_st *module = calloc(1, sizeof *module);
  uint32_t magic;
  memcpy(&magic, image, sizeof magic);
  if (magic == 0xba55ed50 || magic == 0x466243b1) {
    free(module);
    say("%s: fat binaries are not supported", __func__);
    FAIL(CUDA_ERROR_NO_BINARY_FOR_GPU, "a fat binary");
  }
  module->size = image_size(image, &module->is_elf);
  module->image = malloc(module->size);
  memcpy(module->image, image, module->size);
  if (dump_folder) dump(module);
  if (module->is_elf)
    snprintf(module->why, sizeof module->why, "it is machine code (have XLA hand over PTX)");
  else
    module->ptx = ptx_load(
        module->image,
        &(struct ptx_host){
            .arena = arena, .arena_size = ARENA, .shadow = shadow, .allocate = allocate_global, .user = module},
        module->why, sizeof module->why);
  if (!module->ptx && !module->is_elf) say("a module cannot be translated: %s", module->why);
  *handle = module;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule *handle, const void *image, unsigned count, CUjit_option *options,
                                   void **values) {
  for (unsigned i = 0; i < count; i++)
    if (options[i] == CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES || options[i] == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
      values[i] = NULL;
  return cuModuleLoadData(handle, image);
}
EXPORT CUresult cuModuleLoadFatBinary(CUmodule *handle, const void *image) { return cuModuleLoadData(handle, image); }
EXPORT CUresult cuModuleUnload(CUmodule module) {
  ENTER;
  /* Kernels of it may be queued; so nothing is freed but the globals. */
  cuCtxSynchronize();
  pthread_mutex_lock(&lock);
  for (struct global *global = module->globals; global; global = global->next) release(global->address);
  module->globals = NULL;
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode *mode) {
  ENTER;
  *mode = CU_MODULE_EAGER_LOADING;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  ENTER;
  for (struct CUfunc_st *known = module->functions; known; known = known->next)
    if (strcmp(known->name, name) == 0) return *function = known, CUDA_SUCCESS;
  const char *content;
  const struct ptx_kernel *kernel = NULL;
  if (module->ptx) {
    kernel = ptx_find(module->ptx, name);
    if (!kernel) FAIL(CUDA_ERROR_NOT_FOUND, name);
  } else if (module->is_elf && !elf_symbol(module, name, &content)) {
    FAIL(CUDA_ERROR_NOT_FOUND, name);
  }
  struct CUfunc_st *made = calloc(1, sizeof *made);
  made->name = strdup(name);
  made->module = module;
  made->kernel = kernel;
  made->why = kernel ? kernel->why : module->why;
  made->next = module->functions;
  *function = module->functions = made;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetGlobal(CUdeviceptr *pointer, size_t *size, CUmodule module, const char *name) {
  ENTER;
  NEED_CONTEXT;
  struct global *found = module->globals;
  while (found && strcmp(found->name, name) != 0) found = found->next;
  const char *content;
  const Elf64_Sym *symbol = !found && module->is_elf ? elf_symbol(module, name, &content) : NULL;
  if (symbol) {
    allocate_global(module, name, symbol->st_size, content);
    found = module->globals;
  }
  if (!found) FAIL(CUDA_ERROR_NOT_FOUND, name);
  if (pointer) *pointer = found->address;
  if (size) *size = found->size;
  return CUDA_SUCCESS;
}

/* Libraries are modules here, and their kernels functions. */
EXPORT CUresult cuLibraryLoadData(CUlibrary *library, const void *image, CUjit_option *options, void **values,
                                  unsigned count, UNUSED CUlibraryOption *library_options, UNUSED void **library_values,
                                  UNUSED unsigned library_count) {
  return cuModuleLoadDataEx((CUmodule *)library, image, count, options, values);
}
EXPORT CUresult cuLibraryUnload(CUlibrary library) { return cuModuleUnload((CUmodule)library); }
EXPORT CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
  return cuModuleGetFunction((CUfunction *)kernel, (CUmodule)library, name);
}
EXPORT CUresult cuLibraryGetModule(CUmodule *module, CUlibrary library) {
  ENTER;
  *module = (CUmodule)library;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLibraryGetGlobal(CUdeviceptr *pointer, size_t *size, CUlibrary library, const char *name) {
  return cuModuleGetGlobal(pointer, size, (CUmodule)library, name);
}
EXPORT CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
  ENTER;
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuKernelGetName(const char **name, CUkernel kernel) {
  ENTER;
  *name = ((CUfunction)kernel)->name;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetName(const char **name, CUfunction function) {
  ENTER;
  *name = function->name;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetModule(CUmodule *module, CUfunction function) {
  ENTER;
  *module = function->module;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  ENTER;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = 1024;
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = function->kernel ? (int)function->kernel->shared_size : 0;
      break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = 32;
      break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
      *value = 90;
      break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *value = 232448;
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuKernelGetAttribute(int *value, CUfunction_attribute attribute, CUkernel kernel,
                                     UNUSED CUdevice device) {
  return cuFuncGetAttribute(value, attribute, (CUfunction)kernel);
}
EXPORT CUresult cuFuncSetAttribute(UNUSED CUfunction function, UNUSED CUfunction_attribute attribute,
                                   UNUSED int value) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuKernelSetAttribute(UNUSED CUfunction_attribute attribute, UNUSED int value, UNUSED CUkernel kernel,
                                     UNUSED CUdevice device) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(UNUSED CUfunction function, UNUSED CUfunc_cache config) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, UNUSED CUfunction function, int block_size,
                                                            UNUSED size_t shared) {
  ENTER;
  *blocks = 2048 / (block_size ? block_size : 1);
  if (*blocks > 32) *blocks = 32;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, CUfunction function, int block_size,
                                                                     size_t shared, UNUSED unsigned flags) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, block_size, shared);
}
EXPORT CUresult cuOccupancyMaxPotentialBlockSize(int *grid, int *block, UNUSED CUfunction function,
                                                 UNUSED CUoccupancyB2DSize shared_of, UNUSED size_t shared,
                                                 UNUSED int limit) {
  ENTER;
  *grid = 264;
  *block = 1024;
  return CUDA_SUCCESS;
}

static void run_launch(struct op *op) { ptx_run(op->launch); }

static CUresult launch(const char *name, CUfunction function, const unsigned grid[3], const unsigned block[3],
                       size_t shared, CUstream handle, void **parameters, void **extra) {
  CUresult entered = enter(name);
  if (entered != CUDA_SUCCESS) return entered;
  if (trace_level >= 2)
    say("  kernel %s, grid %u %u %u, block %u %u %u", function->name, grid[0], grid[1], grid[2], block[0], block[1],
        block[2]);
  if (!function->kernel || function->kernel->why) {
    say("ERROR: the kernel %s cannot run here: %s", function->name,
        function->kernel ? function->kernel->why : function->why);
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  struct launch *made = ptx_prepare(function->kernel, grid, block, shared, parameters, extra);
  if (!made) return fail(name, CUDA_ERROR_INVALID_VALUE, "parameters");
  pthread_mutex_lock(&lock);
  submit(stream_of(handle, name),
         (struct op){.run = run_launch, .name = function->name, .launch = made, .owned = made});
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                               unsigned bz, unsigned shared, CUstream stream, void **parameters, void **extra) {
  return launch("cuLaunchKernel", function, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, shared, stream,
                parameters, extra);
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters, void **extra) {
  return launch("cuLaunchKernelEx", function, (unsigned[]){c->gridDimX, c->gridDimY, c->gridDimZ},
                (unsigned[]){c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes, c->hStream, parameters,
                extra);
}

/* ---------------------------------------------------------------- graphs */

/* A node can only depend on nodes that exist, so the order in which they were added is one to run them in. */
struct CUgraphNode_st {
  CUgraphNodeType type;
  struct op op;          /* copies, fills, host functions */
  struct launch *launch; /* kernels */
  const char *name;
  CUgraph child;
  struct CUgraphNode_st *origin; /* of a node of something executable: what it was made from */
  struct CUgraphNode_st *next;
};

struct CUgraph_st {
  struct CUgraphNode_st *first, **end;
  size_t count;
};

/* CUgraphExec is a graph of its own. */
static CUgraph graph_of(CUgraphExec exec) { return (CUgraph)exec; }

static CUgraph new_graph(void) {
  CUgraph graph = calloc(1, sizeof *graph);
  graph->end = &graph->first;
  return graph;
}

static CUgraphNode add_node(CUgraph graph, struct CUgraphNode_st content) {
  CUgraphNode node = malloc(sizeof *node);
  *node = content;
  node->next = NULL;
  *graph->end = node;
  graph->end = &node->next;
  graph->count++;
  return node;
}

static void free_graph(CUgraph graph) {
  for (CUgraphNode node = graph->first; node;) {
    CUgraphNode next = node->next;
    if (node->child) free_graph(node->child);
    free(node->launch);
    free(node);
    node = next;
  }
  free(graph);
}

static CUgraph copy_graph(CUgraph graph, bool executable) {
  CUgraph made = new_graph();
  for (CUgraphNode node = graph->first; node; node = node->next) {
    CUgraphNode copy = add_node(made, *node);
    copy->origin = executable ? node : NULL;
    if (node->launch) copy->launch = ptx_copy(node->launch);
    if (node->child) copy->child = copy_graph(node->child, executable);
  }
  return made;
}

/* The node of something executable that was made from `node`. */
static CUgraphNode executable_node(CUgraph graph, CUgraphNode node) {
  for (CUgraphNode own = graph->first; own; own = own->next) {
    if (own->origin == node) return own;
    CUgraphNode found = own->child ? executable_node(own->child, node) : NULL;
    if (found) return found;
  }
  return NULL;
}

static CUresult kernel_node(struct CUgraphNode_st *node, CUfunction function, const unsigned grid[3],
                            const unsigned block[3], size_t shared, void **parameters, void **extra) {
  if (!function->kernel || function->kernel->why) {
    say("ERROR: the kernel %s cannot run here: %s", function->name,
        function->kernel ? function->kernel->why : function->why);
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  free(node->launch);
  node->type = CU_GRAPH_NODE_TYPE_KERNEL;
  node->name = function->name;
  node->launch = ptx_prepare(function->kernel, grid, block, shared, parameters, extra);
  return node->launch ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static CUresult copy_node(struct CUgraphNode_st *node, const CUDA_MEMCPY3D *p) {
  if (p->srcMemoryType == CU_MEMORYTYPE_ARRAY || p->dstMemoryType == CU_MEMORYTYPE_ARRAY || p->Depth > 1)
    return fail("a copy in a graph", CUDA_ERROR_NOT_SUPPORTED, "arrays, or three dimensions");
  uintptr_t from = p->srcMemoryType == CU_MEMORYTYPE_HOST ? (uintptr_t)p->srcHost : p->srcDevice;
  uintptr_t to = p->dstMemoryType == CU_MEMORYTYPE_HOST ? (uintptr_t)p->dstHost : p->dstDevice;
  node->type = CU_GRAPH_NODE_TYPE_MEMCPY;
  node->op = (struct op){.run = run_copy,
                         .name = "copy of a graph",
                         .to = to + p->dstY * p->dstPitch + p->dstXInBytes,
                         .from = from + p->srcY * p->srcPitch + p->srcXInBytes,
                         .width = p->WidthInBytes,
                         .height = p->Height ? p->Height : 1,
                         .to_pitch = p->dstPitch,
                         .from_pitch = p->srcPitch};
  return CUDA_SUCCESS;
}

static CUresult fill_node(struct CUgraphNode_st *node, const CUDA_MEMSET_NODE_PARAMS *p) {
  node->type = CU_GRAPH_NODE_TYPE_MEMSET;
  node->op = (struct op){.run = run_fill,
                         .name = "fill of a graph",
                         .to = p->dst,
                         .to_pitch = p->pitch,
                         .value = p->value,
                         .value_size = p->elementSize,
                         .width = p->width,
                         .height = p->height};
  return CUDA_SUCCESS;
}

static CUresult add_made(CUgraphNode *node, CUgraph graph, struct CUgraphNode_st made, CUresult result) {
  if (result == CUDA_SUCCESS) *node = add_node(graph, made);
  return result;
}

EXPORT CUresult cuGraphCreate(CUgraph *graph, UNUSED unsigned flags) {
  ENTER;
  *graph = new_graph();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphDestroy(CUgraph graph) {
  ENTER;
  free_graph(graph);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphClone(CUgraph *clone, CUgraph graph) {
  ENTER;
  *clone = copy_graph(graph, false);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddKernelNode(CUgraphNode *node, CUgraph graph, UNUSED const CUgraphNode *after,
                                     UNUSED size_t count, const CUDA_KERNEL_NODE_PARAMS *p) {
  ENTER;
  struct CUgraphNode_st made = {0};
  CUresult result =
      kernel_node(&made, p->func ? p->func : (CUfunction)p->kern, (unsigned[]){p->gridDimX, p->gridDimY, p->gridDimZ},
                  (unsigned[]){p->blockDimX, p->blockDimY, p->blockDimZ}, p->sharedMemBytes, p->kernelParams, p->extra);
  return add_made(node, graph, made, result);
}
EXPORT CUresult cuGraphAddMemcpyNode(CUgraphNode *node, CUgraph graph, UNUSED const CUgraphNode *after,
                                     UNUSED size_t count, const CUDA_MEMCPY3D *p, UNUSED CUcontext context) {
  ENTER;
  struct CUgraphNode_st made = {0};
  CUresult result = copy_node(&made, p);
  return add_made(node, graph, made, result);
}
EXPORT CUresult cuGraphAddMemsetNode(CUgraphNode *node, CUgraph graph, UNUSED const CUgraphNode *after,
                                     UNUSED size_t count, const CUDA_MEMSET_NODE_PARAMS *p, UNUSED CUcontext context) {
  ENTER;
  struct CUgraphNode_st made = {0};
  fill_node(&made, p);
  *node = add_node(graph, made);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddHostNode(CUgraphNode *node, CUgraph graph, UNUSED const CUgraphNode *after,
                                   UNUSED size_t count, const CUDA_HOST_NODE_PARAMS *p) {
  ENTER;
  *node =
      add_node(graph, (struct CUgraphNode_st){
                          .type = CU_GRAPH_NODE_TYPE_HOST,
                          .op = {.run = run_host_function, .name = "a graph", .function = p->fn, .data = p->userData}});
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddEmptyNode(CUgraphNode *node, CUgraph graph, UNUSED const CUgraphNode *after,
                                    UNUSED size_t count) {
  ENTER;
  *node = add_node(graph, (struct CUgraphNode_st){.type = CU_GRAPH_NODE_TYPE_EMPTY});
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddChildGraphNode(CUgraphNode *node, CUgraph graph, UNUSED const CUgraphNode *after,
                                         UNUSED size_t count, CUgraph child) {
  ENTER;
  *node = add_node(graph, (struct CUgraphNode_st){.type = CU_GRAPH_NODE_TYPE_GRAPH, .child = copy_graph(child, false)});
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddNode(CUgraphNode *node, CUgraph graph, UNUSED const CUgraphNode *after,
                               UNUSED const CUgraphEdgeData *edges, UNUSED size_t count, CUgraphNodeParams *p) {
  ENTER;
  struct CUgraphNode_st made = {.type = p->type};
  CUresult result = CUDA_SUCCESS;
  switch (p->type) {
    case CU_GRAPH_NODE_TYPE_EMPTY:
      break;
    case CU_GRAPH_NODE_TYPE_GRAPH:
      /* Given away, the graph is the child itself: later updates name its nodes. */
      made.child = p->graph.ownership == CU_GRAPH_CHILD_GRAPH_OWNERSHIP_MOVE ? p->graph.graph
                                                                             : copy_graph(p->graph.graph, false);
      break;
    case CU_GRAPH_NODE_TYPE_KERNEL:
      result = kernel_node(&made, p->kernel.func ? p->kernel.func : (CUfunction)p->kernel.kern,
                           (unsigned[]){p->kernel.gridDimX, p->kernel.gridDimY, p->kernel.gridDimZ},
                           (unsigned[]){p->kernel.blockDimX, p->kernel.blockDimY, p->kernel.blockDimZ},
                           p->kernel.sharedMemBytes, p->kernel.kernelParams, p->kernel.extra);
      break;
    case CU_GRAPH_NODE_TYPE_MEMCPY:
      result = copy_node(&made, &p->memcpy.copyParams);
      break;
    case CU_GRAPH_NODE_TYPE_MEMSET:
      result = fill_node(&made, &(CUDA_MEMSET_NODE_PARAMS){.dst = p->memset.dst,
                                                           .pitch = p->memset.pitch,
                                                           .value = p->memset.value,
                                                           .elementSize = p->memset.elementSize,
                                                           .width = p->memset.width,
                                                           .height = p->memset.height});
      break;
    default:
      FAIL(CUDA_ERROR_NOT_SUPPORTED, "this type of node");
  }
  return add_made(node, graph, made, result);
}
EXPORT CUresult cuGraphChildGraphNodeGetGraph(CUgraphNode node, CUgraph *graph) {
  ENTER;
  *graph = node->child;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphNodeGetType(CUgraphNode node, CUgraphNodeType *type) {
  ENTER;
  *type = node->type;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode *nodes, size_t *count) {
  ENTER;
  size_t i = 0;
  for (CUgraphNode node = graph->first; nodes && node && i < *count; node = node->next) nodes[i++] = node;
  *count = nodes ? i : graph->count;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphAddDependencies(UNUSED CUgraph graph, UNUSED const CUgraphNode *from,
                                       UNUSED const CUgraphNode *to, UNUSED const CUgraphEdgeData *edges,
                                       size_t count) {
  ENTER;
  if (count) FAIL(CUDA_ERROR_NOT_SUPPORTED, "dependencies between nodes that exist");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphInstantiate(CUgraphExec *exec, CUgraph graph, UNUSED unsigned long long flags) {
  ENTER;
  *exec = (CUgraphExec)copy_graph(graph, true);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphInstantiateWithParams(CUgraphExec *exec, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS *p) {
  ENTER;
  p->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS;
  *exec = (CUgraphExec)copy_graph(graph, true);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphExecDestroy(CUgraphExec exec) {
  ENTER;
  free_graph(graph_of(exec)); /* What has been launched has copies. */
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphExecKernelNodeSetParams(CUgraphExec exec, CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS *p) {
  ENTER;
  CUgraphNode own = executable_node(graph_of(exec), node);
  if (!own) FAIL(CUDA_ERROR_INVALID_VALUE, "not a node of this graph");
  return kernel_node(own, p->func ? p->func : (CUfunction)p->kern, (unsigned[]){p->gridDimX, p->gridDimY, p->gridDimZ},
                     (unsigned[]){p->blockDimX, p->blockDimY, p->blockDimZ}, p->sharedMemBytes, p->kernelParams,
                     p->extra);
}
EXPORT CUresult cuGraphExecMemcpyNodeSetParams(CUgraphExec exec, CUgraphNode node, const CUDA_MEMCPY3D *p,
                                               UNUSED CUcontext context) {
  ENTER;
  CUgraphNode own = executable_node(graph_of(exec), node);
  if (!own) FAIL(CUDA_ERROR_INVALID_VALUE, "not a node of this graph");
  return copy_node(own, p);
}
EXPORT CUresult cuGraphExecMemsetNodeSetParams(CUgraphExec exec, CUgraphNode node, const CUDA_MEMSET_NODE_PARAMS *p,
                                               UNUSED CUcontext context) {
  ENTER;
  CUgraphNode own = executable_node(graph_of(exec), node);
  if (!own) FAIL(CUDA_ERROR_INVALID_VALUE, "not a node of this graph");
  return fill_node(own, p);
}
EXPORT CUresult cuGraphExecChildGraphNodeSetParams(CUgraphExec exec, CUgraphNode node, CUgraph child) {
  ENTER;
  CUgraphNode own = executable_node(graph_of(exec), node);
  if (!own || !own->child) FAIL(CUDA_ERROR_INVALID_VALUE, "not a node of this graph");
  free_graph(own->child);
  own->child = copy_graph(child, true);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGraphUpload(UNUSED CUgraphExec exec, UNUSED CUstream stream) {
  ENTER;
  return CUDA_SUCCESS;
}

static void submit_graph(struct CUstream_st *stream, CUgraph graph) {
  for (CUgraphNode node = graph->first; node; node = node->next) {
    if (node->child) submit_graph(stream, node->child);
    if (node->launch) {
      struct launch *launch = ptx_copy(node->launch);
      submit(stream, (struct op){.run = run_launch, .name = node->name, .launch = launch, .owned = launch});
    } else if (node->op.run) {
      submit(stream, node->op);
    }
  }
}
EXPORT CUresult cuGraphLaunch(CUgraphExec exec, CUstream handle) {
  WITH_STREAM(handle);
  submit_graph(stream, graph_of(exec));
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}

/* ---------------------------------------------------------------- others */

EXPORT CUresult cuProfilerStart(void) {
  ENTER;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuProfilerStop(void) {
  ENTER;
  return CUDA_SUCCESS;
}

/* ---------------------------------------------------------------- what is not there */

static CUresult missing(const char *name) {
  enter(name);
  return fail(name, CUDA_ERROR_NOT_SUPPORTED, "the simulated driver does not have it");
}
#define MISSING(name)                                  \
  EXPORT CUresult missing_##name(void) __asm__(#name); \
  CUresult missing_##name(void) { return missing(#name); }
#include "driver_missing.h"

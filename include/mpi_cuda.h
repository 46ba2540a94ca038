/* The public C interface of libpjrt_mpi_cuda.so.
 *
 * The library is a PJRT plugin: load it, call GetPjrtApi() (pjrt_c_api.h) and use the table as any
 * PJRT plugin's. This header adds what it has beyond PJRT: custom-call targets, create options and
 * a few functions. A complete program is tests/c/client.c.
 *
 * Licensed under the Apache License, Version 2.0.
 */
#ifndef MPI_CUDA_H_
#define MPI_CUDA_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------------------------------------
 * Custom calls (XLA typed FFI, api_version 4). All must have has_side_effect = true.
 *
 * Operands: the data sent (x), where the operation sends any, then any number of tokens.
 * Results: the data received (y), where it receives any, then any number of tokens.
 * A token is an s32[] or an XLA token. Operations run in the order in which tokens chain them; XLA
 * may reorder operations that are not chained. Between programs the order is that of their launch.
 *
 * Targets that begin with mpi_cuda_collective_ are the library's own: they stand in programs for
 * several devices.
 *
 * Arrays are dense and row-major. Attributes are integers of 32 or 64 bits; counts, send_counts and
 * recv_counts are arrays of int64 with a number for each rank: the rows of its block along the
 * leading dimension. counts is the same on all ranks. What does not fit is refused by name when the
 * call is executed: an attribute that the target does not have or that is none such, an operand or
 * result more or less, and a result y of another type than x except for mpi_cuda_recv,
 * mpi_cuda_sendrecv and mpi_cuda_wait.
 *
 * mpi4jax's targets (0.9: mpi_allreduce_ffi and so on) are served too, with mpi4jax's attributes,
 * which are integers of 64 bits: those that say what an array has (nitems, dtype and the like) may
 * be left out, and counts must agree with it. Where they are MPI handles, numbers as below are
 * taken as well.
 *
 *   target               data operand -> result     attributes
 *   mpi_cuda_allgather   x -> y (size, *x)          comm
 *   mpi_cuda_allgatherv  x (counts[rank], ...) -> y (sum of counts, ...)  comm, counts
 *   mpi_cuda_allreduce   x -> y as x                comm, op
 *   mpi_cuda_alltoall    x (size, ...) -> y as x    comm
 *   mpi_cuda_alltoallv   x (sum of send_counts, ...) -> y (sum of recv_counts, ...)
 *                                                   comm, send_counts, recv_counts
 *   mpi_cuda_barrier     none                       comm
 *   mpi_cuda_bcast       x -> y as x                comm, root
 *   mpi_cuda_exscan      x -> y as x                comm, op
 *   mpi_cuda_gather      x -> y (size, *x) on the root, as x elsewhere    comm, root
 *   mpi_cuda_gatherv     x (counts[rank], ...) -> y (sum of counts, ...) on the root, as x
 *                        elsewhere                  comm, counts, root
 *   mpi_cuda_iallgather, mpi_cuda_iallreduce, mpi_cuda_ialltoall, mpi_cuda_ibarrier,
 *   mpi_cuda_ibcast, mpi_cuda_iexscan, mpi_cuda_igather, mpi_cuda_ireduce,
 *   mpi_cuda_ireduce_scatter, mpi_cuda_iscan, mpi_cuda_iscatter
 *                        x as without i -> u32[]    as without i
 *   mpi_cuda_irecv       x, empty, tells the dtype -> u32[]    comm, source, recvtag
 *   mpi_cuda_isend       x -> u32[]                 comm, dest, tag
 *   mpi_cuda_neighbor_allgather  x -> y (sources, *x)    comm, sources, destinations
 *   mpi_cuda_neighbor_alltoall   x (destinations, ...) -> y (sources, ...)
 *                                                   comm, sources, destinations
 *   mpi_cuda_recv        none -> y                  comm, source, recvtag, status
 *   mpi_cuda_reduce      x -> y as x                comm, op, root
 *   mpi_cuda_reduce_scatter  x (size, *y) -> y      comm, op
 *   mpi_cuda_scan        x -> y as x                comm, op
 *   mpi_cuda_scatter     x (size, *y) on the root, as y elsewhere -> y    comm, root
 *   mpi_cuda_scatterv    x (sum of counts, ...) on the root, as y elsewhere
 *                        -> y (counts[rank], ...)   comm, counts, root
 *   mpi_cuda_send        x -> none                  comm, dest, tag
 *   mpi_cuda_sendrecv    x -> y                     comm, dest, tag, source, recvtag, status
 *   mpi_cuda_wait        u32[] of an irecv -> y     comm, status
 *                        u32[] of a collective -> y as without i    comm; no status
 *   mpi_cuda_wait_send   u32[] of an isend or ibarrier -> none      comm
 *
 * sources and destinations are how many ranks this one receives from and sends to in the topology
 * of the communicator, which is one of the user's (MPI 4.0, section 8.6). y is 0 where there is
 * none.
 *
 * The u32[] of an irecv or isend names the message until it is waited for, once, and that of an
 * iallreduce and so on the collective (MPI 4.0, section 6.12). The comm of a wait is that of the
 * start; another one is refused, and so is a status for a collective, which has none. What is
 * refused can still be waited for. mpi_cuda_shutdown() completes what was sent, and collectives.
 *
 * Optional, and faster for small programs: an attribute named mpi_cuda_uniform_<comm>_<sequence>,
 * of any integer, on one operation promises that this program always runs the same sequence of
 * operations of all ranks on that communicator (0 or 1), everywhere where <sequence> (16
 * hexadecimal digits) is the same. If the sequence has mpi_cuda_sendrecv, the name ends with
 * _<balance> (16 digits): the sum, modulo 2^64, over them of h(rank, dest, k) - h(source, rank, k),
 * with k the place in the sequence and h any good hash, the same on all ranks; PROC_NULL counts
 * nothing. Other messages, ANY_SOURCE, and a recvtag that is neither ANY_TAG nor the tag sent with
 * must not be in such a program, nor operations on other communicators, nor host callbacks.
 * (mpi_cuda_alike_ at the beginning of the name is accepted too, with a warning.)
 * A name that begins with mpi_cuda_long_uniform_ promises the same of a program that takes long:
 * ranks compare it once for each launch too, and the launch returns before it has ended. It may
 * have host callbacks; then ranks compare each operation.
 *
 * Optional, of all collectives: an attribute place. Where its bits above the lowest 16 (a hash of
 * the program) are the same and others than 0, the lowest 16 must be, too: ranks whose collectives
 * meet from different loops of one program all get an error. 0 is no place.
 *
 * Optional, of what moves arrays without reducing them: an attribute type. Its lowest 8 bits say
 * of which type of less than 8 bits the elements of x are, each in a byte, and the 8 bits above
 * them the same of y: 1 int2, 2 uint2, 3 int4, 4 uint4 (passed as int8 or uint8), 5 float4_e2m1fn
 * (as float8_e4m3fn), 0 the type as it is. Types that differ are refused.
 *
 * Where a rank receives nothing (bcast on the root, gather and reduce elsewhere), y is x.
 * Defaults: comm MPI_CUDA_COMM_DEFAULT, op MPI_CUDA_SUM, root and dest 0, tag 0,
 * source MPI_CUDA_ANY_SOURCE, recvtag MPI_CUDA_ANY_TAG, status 0 (none).
 */

/* Communicators by number: programs never hold an MPI handle. Others: mpi_cuda_comm(). */
enum {
  MPI_CUDA_COMM_WORLD = 0,   /* through a private duplicate */
  MPI_CUDA_COMM_DEFAULT = 1, /* another private duplicate of the world */
  MPI_CUDA_COMM_SELF = 2
};

/* Reductions (MPI 4.0, section 6.9.2), the values of the attribute op. */
enum {
  MPI_CUDA_SUM = 0,
  MPI_CUDA_PROD = 1,
  MPI_CUDA_MIN = 2,
  MPI_CUDA_MAX = 3,
  MPI_CUDA_LAND = 4,
  MPI_CUDA_LOR = 5,
  MPI_CUDA_LXOR = 6,
  MPI_CUDA_BAND = 7,
  MPI_CUDA_BOR = 8,
  MPI_CUDA_BXOR = 9
};

enum {
  MPI_CUDA_ANY_SOURCE = -1, /* attribute source */
  MPI_CUDA_ANY_TAG = -1,    /* attribute recvtag */
  MPI_CUDA_PROC_NULL = -2   /* attributes source and dest */
};
/* Of source and dest, a value below -2^31 is that plus 2^32: a negative number, no rank, to be
 * refused with this number when the operation is executed, in place of what -1 and -2 stand for. */

/* ---------------------------------------------------------------------------------------------
 * Create options of PJRT_Client_Create. Each has the name of an environment variable in lower case
 * without MPI_CUDA_, and wins over it: topology, thread_order, mpi, shim_dir, singleton,
 * warn_after, exit_timeout, log, part_bytes (docs/configuration.md). Values are strings, integers
 * or booleans.
 * Which inner plugin is wrapped is decided when the library is asked for its table, by the
 * environment; the options device and inner_plugin are refused if they disagree.
 */

/* ---------------------------------------------------------------------------------------------
 * Functions. Those that return an int return 0, or -1 and leave a text for mpi_cuda_last_error().
 */

/* Text of the last error of this thread; valid until its next call. */
const char *mpi_cuda_last_error(void);

/* What stands before a line of this library's log (docs/configuration.md, MPI_CUDA_LOG):
 * "2026-11-29T21:50:03.123+01:00 node01 rank 3: mpi_cuda: ". Valid until this thread's next
 * call. */
const char *mpi_cuda_log_prefix(void);

/* Opens the MPI of this process, and initialises nothing (docs/mpi.md, "Which MPI"). Tells its
 * file: an empty text if there is none and none is needed, null on error. Whoever loads an MPI by
 * its name after that gets this one. Valid until this thread's next call. */
const char *mpi_cuda_open_mpi(void);

/* Whether this process may join as a rank, as far as its environment says: 1, or -1 with the error
 * if it is a child of a rank, or another process has joined as this one. */
int mpi_cuda_is_rank(void);

/* What this process is made of, for `python -m mpi_cuda doctor`: lines of a name, a tab and words.
 * Loads the inner plugin, and joins nothing. Valid until this thread's next call. Names, each where
 * it is known: launcher, launched (how many it started), mpi_file, mpi_abi, mpi_by (who named the
 * file), mpi_doubt (why it may be another one than the launcher's), device, device_reason, plugin
 * (the file of the inner one), plugin_version (of PJRT), plugin_error, gpus (how many CUDA shows),
 * driver_version; of a world that was joined mpi_version, thread_level, node_rank, node_size,
 * oversubscribed (0 or 1), compiled_by_others (how many modules and executables this rank has taken
 * from other ranks of its node), gpu (its UUID), transfer, probe_dir, shm_failure. */
const char *mpi_cuda_about(void);

/* Joins the world if that has not happened (collective over the ranks of the job), and tells rank
 * and size in it and the MPI's ABI: "openmpi", "mpich", "mpi_abi" or "none". */
int mpi_cuda_start(int *rank, int *size, const char **family);

/* What names the job, the same on all its ranks and in no other: when it started, in nanoseconds
 * since 1970. 0 before mpi_cuda_start. */
uint64_t mpi_cuda_job(void);

/* The number of a communicator for the attribute comm, and rank and size in it; -1 on error.
 * handle: the MPI_Comm's bits, zero-extended. name: for messages. Nothing collective happens. */
int64_t mpi_cuda_comm(uint64_t handle, const char *name, int *rank, int *size);

/* A number for the attribute op that names a user-defined reduction in this process.
 * handle: the MPI_Op's bits, zero-extended; it must not be freed as long as programs with it run.
 * Each call gives another number. Its function is called on a thread of XLA's. */
int64_t mpi_cuda_op(uint64_t handle);

/* The number of an MPI_Status for the attribute status; it must outlive all programs with it. */
int64_t mpi_cuda_status(void *status);

/* The next program that is compiled with mpi4jax's receives names a status. Its launches return
 * when they have ended, since the caller reads the status then; a program with our operations says
 * the same by an attribute mpi_cuda_reads_status = 1 of one of them. */
void mpi_cuda_reads_status(void);

/* Says in words what a sequence of operations is, by the hash that stands in a program's mark
 * (mpi_cuda_uniform_...): errors of ranks that run different programs name it so. code is the same
 * for sequences that differ only in how often their loops run, and other than 0. Likewise what an
 * attribute place means (code 0): its words come behind the operation. */
void mpi_cuda_describe(uint64_t sequence, uint64_t code, const char *words);

/* Says of which kinds the first collectives of that sequence are, in their order: their names
 * ("allreduce" and so on) with spaces between. If a launch of it fails before one of them, ranks
 * that wait there get an error. */
void mpi_cuda_know_kinds(uint64_t sequence, const char *kinds);

/* 1 if there is an error of an operation, or of a callback beside one, that nobody has read: the
 * next launch with operations raises it. */
int mpi_cuda_has_unread(void);

/* A host callback on a GPU has raised this error. If an operation is in flight it is one of those
 * above, until somebody reads an error with these words in it. */
void mpi_cuda_callback_failed(const char *error);

/* Where the number of launches with operations stands that the main thread has asked for. A caller
 * whose collective fails and finds it as before has launched nothing, and calls mpi_cuda_refuse. */
const uint64_t *mpi_cuda_launches_by_main(void);

/* This rank's program has refused a collective on that communicator, which is 0, 1, or one of the
 * user's that has had a collective, before it called anything here: other ranks that wait in one of
 * this kind ("allreduce" and so on) get an error with these words. If they wait in another kind, it
 * was this rank's own affair. Waits for nobody; from the main thread. */
void mpi_cuda_refuse(int64_t comm, const char *kind, const char *words);

/* 1 if another rank waits in an operation, 0 if not. */
int mpi_cuda_is_awaited(void);

/* Installs the function that says where the threads of Python are, for reports of jobs that wait:
 * it writes at most capacity bytes to text and returns how many, and writes to others how many
 * threads there are beside the main one. NULL removes it. */
void mpi_cuda_set_where(size_t (*function)(char *text, size_t capacity, size_t *others));

/* This rank wants JAX's coordinator, which rank 0 starts: 1 if the address to connect to was
 * written to address, 0 if it is not known yet (ask again), -1 if it will hardly ever be. */
int mpi_cuda_coordinator(char *address, size_t capacity);

/* 1 if that rank of the world has died, or cannot be reached; 0 if it has ended as it should. */
int mpi_cuda_has_died(int rank);

/* 1 if the coordinator is for ranks of other nodes too. */
int mpi_cuda_several_nodes(void);

/* Of rank 0: the coordinator has been started on that port. */
void mpi_cuda_tell_coordinator(uint16_t port);

/* Installs the function that starts the coordinator on rank 0, and connects to it on the others. It
 * is called when another rank wants it, at most once and on a thread of its own, and may wait.
 * NULL removes it. */
void mpi_cuda_set_bring_up(void (*function)(void));

/* Waits until everything dispatched so far has ended; -1 if an operation failed and nobody read
 * its error. */
int mpi_cuda_wait(void);

/* Number of launches with operations that have not ended. */
int mpi_cuda_in_flight(void);

/* Number of launches so far that ran on the calling thread, since all ranks had arrived. */
int mpi_cuda_launches_on_callers(void);

/* Writes the record of this rank's last operations, which `python -m mpi_cuda report` reads, to a
 * file; NULL: to that in MPI_CUDA_RECORD_DIR. */
int mpi_cuda_write_record(const char *path);

/* Records that this rank fails with that status, and why, for the same report. */
void mpi_cuda_failed(int code, const char *words);

/* The main thread of this rank has failed, and other threads of it go on: if other ranks wait in
 * operations for 5 seconds from now on, the job ends with that status. Waits for nobody. */
void mpi_cuda_main_thread_failed(int code, const char *words);

/* Ends the whole job with a non-zero status, once the launcher has read what this rank printed
 * (half a second at most). */
void mpi_cuda_abort(int code);

/* This rank has come to its end: if what it has launched waits longer than MPI_CUDA_EXIT_TIMEOUT
 * for other ranks from now on, that is printed and the job ends with an error. Call before the last
 * mpi_cuda_wait. */
void mpi_cuda_ending(void);

/* Waits for everything and finalizes MPI if this library initialised it. Call once, last. */
void mpi_cuda_shutdown(void);

/* Registers an XLA FFI handler (XLA_FFI_Handler *, any FFI version) under a custom-call target;
 * null makes calls of that target fail by name. */
int mpi_cuda_register_ffi_target(const char *name, void *handler);

/* Registers a function of the custom calls before XLA's FFI (API versions 1 to 3) under a target.
 * A typed call of that target gets there if its attributes are these three alone:
 * mpi_cuda.untyped_convention, the API version; mpi_cuda.untyped_is_tuple, 1 if its result is a
 * tuple, so that the function gets a list of results; mpi_cuda.untyped_opaque, a string of any
 * bytes. Returns the FFI handler that calls the function, null on error. */
void *mpi_cuda_register_untyped_target(const char *name, void *function);

/* An array given to a host callback. */
typedef struct {
  int dtype; /* XLA_FFI_DataType */
  int rank;
  const int64_t *dims; /* outermost first */
  void *data;          /* row-major */
} mpi_cuda_array;

/* Calls a host callback of the framework, by the pointer it attached to the launch. in_place is 1
 * for callbacks that write into their results themselves. Returns 1 if done, else 0 with a text in
 * error. */
typedef int (*mpi_cuda_trampoline)(void *callback, int in_place, int num_args,
                                   const mpi_cuda_array *args, int num_rets,
                                   const mpi_cuda_array *rets, char *error,
                                   size_t error_capacity);

/* Installs the function that calls host callbacks; null removes it. */
void mpi_cuda_set_trampoline(mpi_cuda_trampoline trampoline);

/* Has the framework's own XLA partition a program for several devices, and optimize it, since the
 * program has custom calls that only that XLA can partition (registered by PJRT's extension
 * Custom_Partitioner). program is MLIR as the framework gave it, options a CompileOptionsProto for
 * devices numbered from 0. It calls mpi_cuda_partitioned with result before it returns. */
typedef void (*mpi_cuda_partitioner)(const char *program, size_t program_size, const char *options,
                                     size_t options_size, void *result);

/* Installs that function; null removes it. Without it such programs are refused. Not for GPUs,
 * whose plugin has the extension itself. */
void mpi_cuda_set_partitioner(mpi_cuda_partitioner partitioner);

/* What came of it: an HloModuleProto or, if failed is not 0, words. */
void mpi_cuda_partitioned(void *result, int failed, const char *bytes, size_t size);

/* Calls visit with the name of each operation's custom call, and with an XLA_FFI_Handler that
 * refuses to run: for an XLA that is to partition programs with operations. */
void mpi_cuda_each_target(void (*visit)(const char *name, void *handler));

/* Whether the devices are GPUs. */
int mpi_cuda_on_gpu(void);

/* For `python -m mpi_cuda doctor`, both while no operation is on its way.
 *
 * Writes the bytes of all ranks to all, one after the other, of which each passes as many.
 * Collective over the ranks of the job. */
int mpi_cuda_gather(const void *own, size_t bytes, void *all);
/* The seconds that a message of so many bytes takes to that rank, which must call this too: half of
 * the mean of so many rounds there and back; -1 on error. */
double mpi_cuda_ping(int peer, size_t bytes, int rounds);
/* For `python -m mpi_cuda bench`, while no operation is on its way: the seconds that one call of
 * MPI's takes, which all ranks make, with nothing of the library around it; the mean of so many, -1
 * on error. The operation is named as the custom calls are, without mpi_cuda_, and the dtype as
 * numpy does: a sum where it reduces, rank 0 as the root, to the next rank and from the one before.
 * count is MPI's: of a block, where there are blocks. Collective over the ranks of the job. */
double mpi_cuda_raw(const char *operation, const char *dtype, int64_t count, const void *send,
                    void *recv, int rounds);

/* For `python -m mpi_cuda probe` (MPI_CUDA_PROBE=1). Both are collective over the ranks of the job,
 * and return -1 on error.
 *
 * Turns to the next way to give MPI device memory: 0 arrays as they are, 1 copies, 2 none is
 * left. */
int mpi_cuda_probe_next(void);
/* What came of it on this rank: NULL if all data were right, else what was wrong. 1 if it works on
 * all ranks, 0 if not; it is kept for later jobs with this MPI, driver and plugin. */
int mpi_cuda_probe_report(const char *failure);

#ifdef __cplusplus
}
#endif

#endif /* MPI_CUDA_H_ */

/* Raw MPI: microseconds per operation, by size.
 *
 * Usage: mpirun -n 2 loop [--small-pages] OPERATION BYTES...
 *
 * The arrays lie in huge pages, as those of mpi_cuda do (docs/mpi.md, "Memory of messages"): ranks
 * of a node copy each other's memory page by page, and a comparison should not be one of pages.
 * With --small-pages they come from malloc. */
#define _GNU_SOURCE
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HUGE_PAGE ((size_t)2 << 20)

/* So many bytes, all of them zero and touched. */
static void *array(size_t bytes, int small) {
  void *memory = NULL;
  size_t rounded = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  if (small) {
    memory = malloc(bytes);
  } else if (posix_memalign(&memory, HUGE_PAGE, rounded) == 0) {
    /* Advice: without it there are small pages. */
    madvise(memory, rounded, MADV_HUGEPAGE);
  }
  if (memory == NULL) {
    fprintf(stderr, "loop: there is no memory for %zu bytes\n", bytes);
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  memset(memory, 0, bytes);
  return memory;
}

static void once(const char *op, const float *send, float *recv, int n, int rank, int size) {
  if (op[0] == 's') {
    int peer = (rank + 1) % size, from = (rank + size - 1) % size;
    MPI_Sendrecv(send, n, MPI_FLOAT, peer, 0, recv, n, MPI_FLOAT, from, 0, MPI_COMM_WORLD,
                 MPI_STATUS_IGNORE);
  } else if (!strcmp(op, "allreduce")) {
    MPI_Allreduce(send, recv, n, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  } else if (!strcmp(op, "allgather")) {
    MPI_Allgather(send, n, MPI_FLOAT, recv, n, MPI_FLOAT, MPI_COMM_WORLD);
  } else {
    MPI_Alltoall(send, n / size, MPI_FLOAT, recv, n / size, MPI_FLOAT, MPI_COMM_WORLD);
  }
}

int main(int argc, char **argv) {
  int rank, size, level;
  /* The same thread level as ours: some MPIs pay for it. */
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  int small = argc > 1 && !strcmp(argv[1], "--small-pages");
  const char *operation = argc > 1 + small ? argv[1 + small] : "";
  for (int i = 2 + small; i < argc; i++) {
    long bytes = atol(argv[i]);
    int n = (int)(bytes / (long)sizeof(float));
    float *send = array(bytes, small), *recv = array(bytes * size, small);
    for (int k = 0; k < n; k++) send[k] = 1.0f;
    int count = bytes <= 65536 ? 2000 : bytes <= (1 << 20) ? 200 : bytes <= (1 << 24) ? 20 : 4;
    for (int k = 0; k < count / 4 + 1; k++) once(operation, send, recv, n, rank, size);
    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime();
    for (int k = 0; k < count; k++) once(operation, send, recv, n, rank, size);
    double microseconds = (MPI_Wtime() - start) / count * 1e6;
    if (rank == 0) printf("loop %ld %.3f\n", bytes, microseconds);
    free(send);
    free(recv);
  }
  MPI_Finalize();
  return 0;
}

/* Raw MPI: microseconds per operation, by size. Usage: mpirun -n 2 loop OPERATION BYTES... */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
  for (int i = 2; i < argc; i++) {
    long bytes = atol(argv[i]);
    int n = (int)(bytes / (long)sizeof(float));
    float *send = malloc(bytes), *recv = malloc(bytes * size);
    for (int k = 0; k < n; k++) send[k] = 1.0f;
    memset(recv, 0, bytes * size);
    int count = bytes <= 65536 ? 2000 : bytes <= (1 << 20) ? 200 : bytes <= (1 << 24) ? 20 : 4;
    for (int k = 0; k < count / 4 + 1; k++) once(argv[1], send, recv, n, rank, size);
    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime();
    for (int k = 0; k < count; k++) once(argv[1], send, recv, n, rank, size);
    double microseconds = (MPI_Wtime() - start) / count * 1e6;
    if (rank == 0) printf("loop %ld %.3f\n", bytes, microseconds);
    free(send);
    free(recv);
  }
  MPI_Finalize();
  return 0;
}

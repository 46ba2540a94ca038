/* A framework that ends without a word to the library: whoever has initialised MPI finalizes it.
 *
 * Usage: mpirun -n 2 leave LIBRARY STATUS: rank 1 ends with that status. */

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "pjrt_c_api.h"

int main(int argc, char **argv) {
  void *library = argc == 3 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL;
  if (library == NULL) return 2;
  const PJRT_Api *(*get)(void) = (const PJRT_Api *(*)(void))dlsym(library, "GetPjrtApi");
  const PJRT_Api *api = get();
  PJRT_Plugin_Initialize_Args init = {.struct_size = PJRT_Plugin_Initialize_Args_STRUCT_SIZE};
  PJRT_Client_Create_Args create = {.struct_size = PJRT_Client_Create_Args_STRUCT_SIZE};
  if (api->PJRT_Plugin_Initialize(&init) || api->PJRT_Client_Create(&create)) return 2;
  PJRT_Client_ProcessIndex_Args index = {.struct_size = PJRT_Client_ProcessIndex_Args_STRUCT_SIZE};
  index.client = create.client;
  if (api->PJRT_Client_ProcessIndex(&index)) return 2;
  printf("rank %d ends\n", index.process_index);
  return index.process_index == 1 ? atoi(argv[2]) : 0;
}

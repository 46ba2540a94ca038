/* Uses the plugin from C, as any PJRT framework would: loads it, makes a client, compiles StableHLO
 * text with an allreduce and a send/receive pair, runs it under mpirun, and looks at an error.
 *
 * Usage: mpirun -n 2 client PATH/libpjrt_mpi_cuda.so
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <threads.h>
#include <time.h>

#include "mpi_cuda.h"
#include "pjrt_c_api.h"

static const PJRT_Api *api;
static int rank, size, passed, failed;

static void check(int ok, const char *what) {
  if (ok) {
    passed++;
  } else {
    failed++;
    fprintf(stderr, "rank %d: FAILED: %s\n", rank, what);
  }
}

/* Copies the message and destroys the error. */
static int take_error(PJRT_Error *error, char *text, size_t capacity) {
  if (error == NULL) {
    text[0] = 0;
    return 0;
  }
  PJRT_Error_Message_Args message = {.struct_size = PJRT_Error_Message_Args_STRUCT_SIZE};
  message.error = error;
  api->PJRT_Error_Message(&message);
  snprintf(text, capacity, "%.*s", (int)message.message_size, message.message);
  PJRT_Error_Destroy_Args destroy = {.struct_size = PJRT_Error_Destroy_Args_STRUCT_SIZE};
  destroy.error = error;
  api->PJRT_Error_Destroy(&destroy);
  return 1;
}

static void must(PJRT_Error *error, const char *what) {
  char text[4096];
  if (take_error(error, text, sizeof text)) {
    fprintf(stderr, "rank %d: %s: %s\n", rank, what, text);
    exit(1);
  }
}

static void await_event(PJRT_Event *event, char *text, size_t capacity) {
  PJRT_Event_Await_Args await = {.struct_size = PJRT_Event_Await_Args_STRUCT_SIZE};
  await.event = event;
  take_error(api->PJRT_Event_Await(&await), text, capacity);
  PJRT_Event_Destroy_Args destroy = {.struct_size = PJRT_Event_Destroy_Args_STRUCT_SIZE};
  destroy.event = event;
  must(api->PJRT_Event_Destroy(&destroy), "destroy event");
}

/* A CompileOptionsProto for one device: executable_build_options (3) with num_replicas (4),
 * num_partitions (5) and device_assignment (9). */
static size_t compile_options(unsigned char *bytes, int device) {
  unsigned char options[] = {0x1a, 16,   0x20, 1, 0x28, 1,    0x4a, 10,  0x08,
                             1,    0x10, 1,    0x1a, 4, 0x0a, 2, 0, 0};
  options[16] = (unsigned char)(device | 0x80);
  options[17] = 0;
  memcpy(bytes, options, sizeof options);
  return sizeof options;
}

/* Compiles a program for one device, or for none in particular if that is negative. */
enum { NONE = -1, PORTABLE = -2 };
static PJRT_Error *compile_for(PJRT_Client *client, const char *text, int device,
                               PJRT_LoadedExecutable **executable) {
  PJRT_Program program = {.struct_size = PJRT_Program_STRUCT_SIZE};
  program.code = (char *)text;
  program.code_size = strlen(text);
  program.format = "mlir";
  program.format_size = 4;
  unsigned char options[64];
  PJRT_Client_Compile_Args args = {.struct_size = PJRT_Client_Compile_Args_STRUCT_SIZE};
  args.client = client;
  args.program = &program;
  args.compile_options_size = compile_options(options, device);
  if (device < 0) {
    /* Without the device assignment. */
    options[1] = 4;
    args.compile_options_size = 6;
  }
  if (device == PORTABLE) {
    /* compile_portable_executable (4) */
    options[6] = 0x20;
    options[7] = 1;
    args.compile_options_size = 8;
  }
  args.compile_options = (char *)options;
  PJRT_Error *error = api->PJRT_Client_Compile(&args);
  *executable = args.executable;
  return error;
}

static PJRT_LoadedExecutable *compile(PJRT_Client *client, const char *text) {
  PJRT_LoadedExecutable *executable;
  must(compile_for(client, text, rank, &executable), "compile");
  return executable;
}

/* The device that a program for one is assigned to; -1 if it is assigned to none. */
static int assigned(PJRT_LoadedExecutable *executable) {
  PJRT_LoadedExecutable_GetDeviceAssignment_Args args = {
      .struct_size = PJRT_LoadedExecutable_GetDeviceAssignment_Args_STRUCT_SIZE};
  args.executable = executable;
  must(api->PJRT_LoadedExecutable_GetDeviceAssignment(&args), "device assignment");
  if (args.serialized_bytes_size == 0) return -1;
  /* A DeviceAssignmentProto with 1 replica and 1 computation; its last byte is the device. */
  int device = args.serialized_bytes[args.serialized_bytes_size - 1];
  args.serialized_device_assignment_deleter(args.serialized_device_assignment);
  return device;
}

static size_t addressable(PJRT_LoadedExecutable *executable) {
  PJRT_LoadedExecutable_AddressableDevices_Args args = {
      .struct_size = PJRT_LoadedExecutable_AddressableDevices_Args_STRUCT_SIZE};
  args.executable = executable;
  must(api->PJRT_LoadedExecutable_AddressableDevices(&args), "devices of a program");
  return args.num_addressable_devices;
}

/* done happens when data may be changed or freed. */
static PJRT_Error *share(PJRT_Client *client, PJRT_Device *device, const void *data,
                         PJRT_HostBufferSemantics semantics, PJRT_Buffer **buffer,
                         PJRT_Event **done) {
  static const int64_t dims[] = {4};
  PJRT_Client_BufferFromHostBuffer_Args args = {
      .struct_size = PJRT_Client_BufferFromHostBuffer_Args_STRUCT_SIZE};
  args.client = client;
  args.data = data;
  args.type = PJRT_Buffer_Type_F32;
  args.dims = dims;
  args.num_dims = 1;
  args.host_buffer_semantics = semantics;
  args.device = device;
  PJRT_Error *error = api->PJRT_Client_BufferFromHostBuffer(&args);
  *buffer = args.buffer;
  *done = args.done_with_host_buffer;
  return error;
}

static PJRT_Error *to_device(PJRT_Client *client, PJRT_Device *device, const float *data,
                             PJRT_Buffer **buffer) {
  PJRT_Event *done;
  PJRT_Error *error = share(client, device, data,
                            PJRT_HostBufferSemantics_kImmutableOnlyDuringCall, buffer, &done);
  if (error == NULL) {
    char text[256];
    await_event(done, text, sizeof text);
  }
  return error;
}

/* Launches a program of one operand and one result; NULL and an error if it is refused. */
static size_t options_size = PJRT_ExecuteOptions_STRUCT_SIZE;
static PJRT_Buffer *launch(PJRT_LoadedExecutable *executable, PJRT_Buffer *operand, char *error,
                           size_t capacity) {
  PJRT_ExecuteOptions options = {.struct_size = options_size};
  PJRT_Buffer *const arguments[] = {operand};
  PJRT_Buffer *const *const argument_lists[] = {arguments};
  PJRT_Buffer *outputs[1] = {NULL};
  PJRT_Buffer **const output_lists[] = {outputs};
  PJRT_LoadedExecutable_Execute_Args args = {
      .struct_size = PJRT_LoadedExecutable_Execute_Args_STRUCT_SIZE};
  args.executable = executable;
  args.options = &options;
  args.argument_lists = argument_lists;
  args.num_devices = 1;
  args.num_args = 1;
  args.output_lists = output_lists;
  take_error(api->PJRT_LoadedExecutable_Execute(&args), error, capacity);
  return outputs[0];
}

/* Reads a buffer of f32[4]; error is empty on success. */
static void read_buffer(PJRT_Buffer *buffer, float *result, char *error, size_t capacity) {
  PJRT_Buffer_ToHostBuffer_Args copy = {.struct_size = PJRT_Buffer_ToHostBuffer_Args_STRUCT_SIZE};
  copy.src = buffer;
  copy.dst = result;
  copy.dst_size = 4 * sizeof *result;
  if (!take_error(api->PJRT_Buffer_ToHostBuffer(&copy), error, capacity))
    await_event(copy.event, error, capacity);
}

static void destroy_buffer(PJRT_Buffer *buffer) {
  PJRT_Buffer_Destroy_Args destroy = {.struct_size = PJRT_Buffer_Destroy_Args_STRUCT_SIZE};
  destroy.buffer = buffer;
  must(api->PJRT_Buffer_Destroy(&destroy), "destroy buffer");
}

/* Runs a program of one operand and one result of f32[4]; error is empty on success. */
static void run(PJRT_LoadedExecutable *executable, PJRT_Buffer *operand, float *result, char *error,
                size_t capacity) {
  PJRT_Buffer *output = launch(executable, operand, error, capacity);
  if (output == NULL) return;
  read_buffer(output, result, error, capacity);
  destroy_buffer(output);
}

/* Every way to share memory of the host, wherever it begins. */
static void share_all(PJRT_Client *client, PJRT_Device *device) {
  static const size_t offsets[] = {0, 1, 16, 32, 48};
  static const float data[] = {1, 2, 3, 4};
  static _Alignas(64) unsigned char memory[128];
  char error[1024];
  int right = 0;
  for (int semantics = PJRT_HostBufferSemantics_kImmutableOnlyDuringCall;
       semantics <= PJRT_HostBufferSemantics_kMutableZeroCopy; semantics++)
    for (size_t i = 0; i < sizeof offsets / sizeof *offsets; i++) {
      float result[4] = {0};
      PJRT_Buffer *buffer;
      PJRT_Event *done;
      memcpy(memory + offsets[i], data, sizeof data);
      must(share(client, device, memory + offsets[i], semantics, &buffer, &done), "share");
      read_buffer(buffer, result, error, sizeof error);
      right += error[0] == 0 && memcmp(result, data, sizeof data) == 0;
      destroy_buffer(buffer);
      await_event(done, error, sizeof error);
    }
  check(right == 20, "memory of the host is shared in every way, wherever it begins");
}

/* Both ranks take the maximum of donated operands many times; rank 0 runs ahead of rank 1. */
static void donate(PJRT_Client *client, PJRT_Buffer *operand) {
  static const char *text =
      "module @donate {\n"
      "  func.func public @main(%x: tensor<4xf32> {tf.aliasing_output = 0 : i32})\n"
      "      -> tensor<4xf32> {\n"
      "    %y, %t = stablehlo.custom_call @mpi_cuda_allreduce(%x) {api_version = 4 : i32,\n"
      "      has_side_effect = true, backend_config = {comm = 0 : i64, op = 3 : i64}}\n"
      "      : (tensor<4xf32>) -> (tensor<4xf32>, tensor<i32>)\n"
      "    return %y : tensor<4xf32>\n"
      "  }\n"
      "}\n";
  enum { COUNT = 60 };
  char error[4096];
  float result[4] = {0};
  PJRT_LoadedExecutable *executable = compile(client, text);
  PJRT_Buffer *buffers[COUNT + 1] = {operand};
  int deleted = 0, launched = 0;
  if (rank == 1) thrd_sleep(&(struct timespec){.tv_sec = 1}, NULL);
  for (int i = 0; i < COUNT; i++) {
    buffers[i + 1] = launch(executable, buffers[i], error, sizeof error);
    launched += buffers[i + 1] != NULL;
    PJRT_Buffer_IsDeleted_Args args = {.struct_size = PJRT_Buffer_IsDeleted_Args_STRUCT_SIZE};
    args.buffer = buffers[i];
    must(api->PJRT_Buffer_IsDeleted(&args), "is deleted");
    deleted += args.is_deleted;
  }
  check(launched == COUNT && deleted == COUNT, "what is donated is deleted at once");
  PJRT_Buffer *old = buffers[COUNT - 1];
  check(launch(executable, old, error, sizeof error) == NULL && strstr(error, "deleted or donated"),
        "a launch that uses it is refused");
  read_buffer(old, result, error, sizeof error);
  check(strstr(error, "deleted or donated") != NULL, "reading it is refused");
  PJRT_Buffer_ReadyEvent_Args ready = {.struct_size = PJRT_Buffer_ReadyEvent_Args_STRUCT_SIZE};
  ready.buffer = old;
  must(api->PJRT_Buffer_ReadyEvent(&ready), "ready event");
  await_event(ready.event, error, sizeof error);
  check(strstr(error, "deleted or donated") != NULL, "waiting for it is refused");
  read_buffer(buffers[COUNT], result, error, sizeof error);
  check(error[0] == 0 && result[0] == 2 && result[3] == 5, "the last result is right");
  for (int i = 1; i <= COUNT; i++) destroy_buffer(buffers[i]);
}

/* What is said of a rank's device, whoever asks. */
static void describe(PJRT_Device *device, int owner) {
  PJRT_Device_GetDescription_Args get = {
      .struct_size = PJRT_Device_GetDescription_Args_STRUCT_SIZE};
  get.device = device;
  must(api->PJRT_Device_GetDescription(&get), "description");
  PJRT_DeviceDescription_Id_Args id = {.struct_size = PJRT_DeviceDescription_Id_Args_STRUCT_SIZE};
  id.device_description = get.device_description;
  must(api->PJRT_DeviceDescription_Id(&id), "id");
  PJRT_DeviceDescription_ProcessIndex_Args process = {
      .struct_size = PJRT_DeviceDescription_ProcessIndex_Args_STRUCT_SIZE};
  process.device_description = get.device_description;
  must(api->PJRT_DeviceDescription_ProcessIndex(&process), "process index of a device");
  check(id.id == owner && process.process_index == owner, "a device has the number of its rank");
  PJRT_DeviceDescription_ToString_Args text = {
      .struct_size = PJRT_DeviceDescription_ToString_Args_STRUCT_SIZE};
  text.device_description = get.device_description;
  must(api->PJRT_DeviceDescription_ToString(&text), "text");
  PJRT_DeviceDescription_DebugString_Args debug = {
      .struct_size = PJRT_DeviceDescription_DebugString_Args_STRUCT_SIZE};
  debug.device_description = get.device_description;
  must(api->PJRT_DeviceDescription_DebugString(&debug), "text for developers");
  check(memchr(text.to_string, '0' + owner, text.to_string_size) != NULL &&
            memchr(debug.debug_string, '0' + owner, debug.debug_string_size) != NULL,
        "a device is called by its rank");
  PJRT_DeviceDescription_Kind_Args kind = {
      .struct_size = PJRT_DeviceDescription_Kind_Args_STRUCT_SIZE};
  kind.device_description = get.device_description;
  must(api->PJRT_DeviceDescription_Kind(&kind), "kind");
  check(kind.device_kind_size == 3 && memcmp(kind.device_kind, "cpu", 3) == 0 &&
            kind.device_description == get.device_description,
        "devices are of one kind");
  PJRT_DeviceDescription_Attributes_Args attributes = {
      .struct_size = PJRT_DeviceDescription_Attributes_Args_STRUCT_SIZE};
  attributes.device_description = get.device_description;
  must(api->PJRT_DeviceDescription_Attributes(&attributes), "attributes");
  PJRT_Device_IsAddressable_Args is = {.struct_size = PJRT_Device_IsAddressable_Args_STRUCT_SIZE};
  is.device = device;
  must(api->PJRT_Device_IsAddressable(&is), "addressable");
  check(is.is_addressable == (owner == rank), "a rank's own device is addressable");
}

/* Devices of other ranks are shown, and nothing can be done with them. */
static void devices_of_others(PJRT_Client *client, PJRT_Device *const *devices) {
  char text[4096];
  for (int owner = 0; owner < size; owner++) {
    describe(devices[owner], owner);
    PJRT_Client_LookupDevice_Args find = {.struct_size = PJRT_Client_LookupDevice_Args_STRUCT_SIZE};
    find.client = client;
    find.id = owner;
    must(api->PJRT_Client_LookupDevice(&find), "look up a device");
    check(find.device == devices[owner], "a device is found by its number");
  }
  PJRT_Client_LookupDevice_Args find = {.struct_size = PJRT_Client_LookupDevice_Args_STRUCT_SIZE};
  find.client = client;
  find.id = 7;
  check(take_error(api->PJRT_Client_LookupDevice(&find), text, sizeof text) &&
            strstr(text, "no device 7: there are those from 0 to 1"),
        "a device that is not there is refused");

  PJRT_Device *other = devices[1 - rank];
  PJRT_Device_AddressableMemories_Args memories = {
      .struct_size = PJRT_Device_AddressableMemories_Args_STRUCT_SIZE};
  memories.device = other;
  must(api->PJRT_Device_AddressableMemories(&memories), "memories of another rank's device");
  check(memories.num_memories == 0, "no memory of another rank's can be addressed");
  PJRT_Device_DefaultMemory_Args memory = {
      .struct_size = PJRT_Device_DefaultMemory_Args_STRUCT_SIZE};
  memory.device = other;
  check(take_error(api->PJRT_Device_DefaultMemory(&memory), text, sizeof text) &&
            strstr(text, "belongs to rank"),
        "another rank's memory is refused");
  PJRT_Device_MemoryStats_Args stats = {.struct_size = PJRT_Device_MemoryStats_Args_STRUCT_SIZE};
  stats.device = other;
  check(take_error(api->PJRT_Device_MemoryStats(&stats), text, sizeof text) &&
            strstr(text, "belongs to rank"),
        "another rank's memory is not measured here");

  PJRT_Client_TopologyDescription_Args topology = {
      .struct_size = PJRT_Client_TopologyDescription_Args_STRUCT_SIZE};
  topology.client = client;
  must(api->PJRT_Client_TopologyDescription(&topology), "topology");
  PJRT_TopologyDescription_GetDeviceDescriptions_Args described = {
      .struct_size = PJRT_TopologyDescription_GetDeviceDescriptions_Args_STRUCT_SIZE};
  described.topology = topology.topology;
  must(api->PJRT_TopologyDescription_GetDeviceDescriptions(&described), "descriptions");
  check((int)described.num_descriptions == size, "the topology has the devices of all ranks");

  int assignment[4] = {9, 9, 9, 9};
  PJRT_Client_DefaultDeviceAssignment_Args numbers = {
      .struct_size = PJRT_Client_DefaultDeviceAssignment_Args_STRUCT_SIZE};
  numbers.client = client;
  numbers.num_replicas = 1;
  numbers.num_partitions = 1;
  numbers.default_assignment = assignment;
  numbers.default_assignment_size = 1;
  must(api->PJRT_Client_DefaultDeviceAssignment(&numbers), "default assignment");
  check(assignment[0] == rank && assignment[1] == 9, "a program for one device is for one's own");
  numbers.num_partitions = 2;
  numbers.default_assignment_size = 2;
  must(api->PJRT_Client_DefaultDeviceAssignment(&numbers), "default assignment of two");
  check(assignment[0] == 0 && assignment[1] == 1 && assignment[2] == 9,
        "a program for two devices is for the first two");
  numbers.num_replicas = 2;
  numbers.default_assignment_size = 4;
  check(take_error(api->PJRT_Client_DefaultDeviceAssignment(&numbers), text, sizeof text) &&
            strstr(text, "more than the 2 devices"),
        "there is no assignment to more devices than there are");
}

static const char *const NEGATE = "module @negate {\n"
                                  "  func.func public @main(%x: tensor<4xf32>) -> tensor<4xf32> {\n"
                                  "    %y = stablehlo.negate %x : tensor<4xf32>\n"
                                  "    return %y : tensor<4xf32>\n"
                                  "  }\n"
                                  "}\n";

/* Which device a program is for, by its options. */
static void places(PJRT_Client *client, PJRT_Buffer *x) {
  char text[4096];
  float result[4] = {0};
  PJRT_LoadedExecutable *own = compile(client, NEGATE), *anywhere, *other;
  check(assigned(own) == rank && addressable(own) == 1, "a program is for this rank's device");
  must(compile_for(client, NEGATE, NONE, &anywhere), "compile for no device in particular");
  check(assigned(anywhere) == rank, "a program without a device is for this rank's");
  /* Older frameworks' options end before call_location. */
  options_size = offsetof(PJRT_ExecuteOptions, call_location);
  run(anywhere, x, result, text, sizeof text);
  check(text[0] == 0 && result[0] == -1 - rank, "it runs with shorter options");
  options_size = PJRT_ExecuteOptions_STRUCT_SIZE;
  run(anywhere, x, result, text, sizeof text);
  check(text[0] == 0 && result[0] == -1 - rank, "it runs there");
  must(compile_for(client, NEGATE, PORTABLE, &other), "compile for whatever device");
  check(assigned(other) == -1, "a portable program is assigned to no device");
  must(compile_for(client, NEGATE, 1 - rank, &other), "compile for another rank's device");
  check(assigned(other) == 1 - rank && addressable(other) == 0, "a program may be for another's");
  check(take_error(compile_for(client, NEGATE, 7, &other), text, sizeof text) &&
            strstr(text, "device 7") && strstr(text, "from 0 to 1"),
        "a program for a device that is not there is refused");
}

/* Arguments of functions that newer plugins have after those of our header. */
struct load_args {
  size_t struct_size;
  void *extension_start;
  PJRT_Client *client;
  PJRT_Executable *executable;
  const char *compile_options;
  size_t compile_options_size;
  PJRT_LoadedExecutable *loaded_executable;
};
struct logical_ids_args {
  size_t struct_size;
  void *extension_start;
  PJRT_LoadedExecutable *executable;
  const int (*ids)[2];
  size_t num_ids;
};

static PJRT_Error *call_newer(size_t place, void *args) {
  return ((PJRT_Error * (*const *)(void *)) api)[place](args);
}

static PJRT_LoadedExecutable *load(PJRT_Client *client, const char *bytes, size_t size) {
  PJRT_Executable_DeserializeAndLoad_Args args = {
      .struct_size = PJRT_Executable_DeserializeAndLoad_Args_STRUCT_SIZE};
  args.client = client;
  args.serialized_executable = bytes;
  args.serialized_executable_size = size;
  must(api->PJRT_Executable_DeserializeAndLoad(&args), "load what was serialized");
  return args.loaded_executable;
}

/* A program that is compiled for the topology, loaded, and serialized. */
static void ahead(PJRT_Client *client, PJRT_Buffer *x) {
  /* PJRT_Client_Load and PJRT_LoadedExecutable_AddressableDeviceLogicalIds */
  enum { LOAD = 134, LOGICAL_IDS = 135 };
  if (api->struct_size <= LOGICAL_IDS * sizeof(void *)) return;
  char text[4096];
  float result[4] = {0};
  unsigned char options[64];
  PJRT_Client_TopologyDescription_Args topology = {
      .struct_size = PJRT_Client_TopologyDescription_Args_STRUCT_SIZE};
  topology.client = client;
  must(api->PJRT_Client_TopologyDescription(&topology), "topology");
  PJRT_Program program = {.struct_size = PJRT_Program_STRUCT_SIZE};
  program.code = (char *)NEGATE;
  program.code_size = strlen(NEGATE);
  program.format = "mlir";
  program.format_size = 4;
  PJRT_Compile_Args args = {.struct_size = PJRT_Compile_Args_STRUCT_SIZE};
  args.topology = topology.topology;
  args.program = &program;
  args.compile_options_size = compile_options(options, rank);
  args.compile_options = (char *)options;
  must(api->PJRT_Compile(&args), "compile for a topology");

  struct load_args to_load = {sizeof to_load, NULL, client, args.executable, (char *)options,
                              args.compile_options_size, NULL};
  must(call_newer(LOAD, &to_load), "load a program compiled for a topology");
  check(assigned(to_load.loaded_executable) == rank, "it is for this rank's device");
  run(to_load.loaded_executable, x, result, text, sizeof text);
  check(text[0] == 0 && result[0] == -1 - rank, "it runs there");
  struct logical_ids_args ids = {sizeof ids, NULL, to_load.loaded_executable, NULL, 0};
  must(call_newer(LOGICAL_IDS, &ids), "replicas and partitions");
  check(ids.num_ids == 1 && ids.ids[0][0] == 0 && ids.ids[0][1] == 0, "it is partition 0");

  PJRT_Executable_Serialize_Args bytes = {
      .struct_size = PJRT_Executable_Serialize_Args_STRUCT_SIZE};
  bytes.executable = args.executable;
  must(api->PJRT_Executable_Serialize(&bytes), "serialize");
  PJRT_LoadedExecutable *loaded =
      load(client, bytes.serialized_bytes, bytes.serialized_bytes_size);
  result[0] = 0;
  run(loaded, x, result, text, sizeof text);
  check(text[0] == 0 && result[0] == -1 - rank, "what was serialized runs here too");
}

/* A program with one custom call, whose attributes follow. */
static const char *program(const char *target, const char *attributes) {
  static char text[2048];
  snprintf(text, sizeof text,
           "module @test {\n"
           "  func.func public @main(%%x: tensor<4xf32>) -> tensor<4xf32> {\n"
           "    %%y = stablehlo.custom_call @%s(%%x) {api_version = 4 : i32,\n"
           "      has_side_effect = true, backend_config = {%s}}\n"
           "      : (tensor<4xf32>) -> tensor<4xf32>\n"
           "    return %%y : tensor<4xf32>\n"
           "  }\n"
           "}\n",
           target, attributes);
  return text;
}

/* Rank 0 sends, rank 1 receives and sends twice as much back; tokens keep the order. */
static const char *pair(void) {
  return rank == 0
             ? "module @pair {\n"
               "  func.func public @main(%x: tensor<4xf32>) -> tensor<4xf32> {\n"
               "    %t = stablehlo.custom_call @mpi_cuda_send(%x) {api_version = 4 : i32,\n"
               "      has_side_effect = true, backend_config = {dest = 1 : i64, tag = 7 : i64}}\n"
               "      : (tensor<4xf32>) -> tensor<i32>\n"
               "    %y, %u = stablehlo.custom_call @mpi_cuda_recv(%t) {api_version = 4 : i32,\n"
               "      has_side_effect = true, backend_config = {source = 1 : i64}}\n"
               "      : (tensor<i32>) -> (tensor<4xf32>, tensor<i32>)\n"
               "    return %y : tensor<4xf32>\n"
               "  }\n"
               "}\n"
             : "module @pair {\n"
               "  func.func public @main(%x: tensor<4xf32>) -> tensor<4xf32> {\n"
               "    %y, %t = stablehlo.custom_call @mpi_cuda_recv() {api_version = 4 : i32,\n"
               "      has_side_effect = true,\n"
               "      backend_config = {source = 0 : i64, recvtag = 7 : i64}}\n"
               "      : () -> (tensor<4xf32>, tensor<i32>)\n"
               "    %z = stablehlo.add %y, %y : tensor<4xf32>\n"
               "    %u = stablehlo.custom_call @mpi_cuda_send(%z, %t) {api_version = 4 : i32,\n"
               "      has_side_effect = true, backend_config = {dest = 0 : i64}}\n"
               "      : (tensor<4xf32>, tensor<i32>) -> tensor<i32>\n"
               "    return %y : tensor<4xf32>\n"
               "  }\n"
               "}\n";
}

/* Both ranks start a send and a receive, and then wait for both. */
static const char *halves(void) {
  static char text[2048];
  snprintf(text, sizeof text,
           "module @halves {\n"
           "  func.func public @main(%%x: tensor<4xf32>) -> tensor<4xf32> {\n"
           "    %%e = stablehlo.constant dense<> : tensor<0xf32>\n"
           "    %%r, %%a = stablehlo.custom_call @mpi_cuda_irecv(%%e) {api_version = 4 : i32,\n"
           "      has_side_effect = true, backend_config = {source = %d : i64}}\n"
           "      : (tensor<0xf32>) -> (tensor<ui32>, tensor<i32>)\n"
           "    %%s, %%b = stablehlo.custom_call @mpi_cuda_isend(%%x, %%a) {api_version = 4 : i32,\n"
           "      has_side_effect = true, backend_config = {dest = %d : i64}}\n"
           "      : (tensor<4xf32>, tensor<i32>) -> (tensor<ui32>, tensor<i32>)\n"
           "    %%y, %%c = stablehlo.custom_call @mpi_cuda_wait(%%r, %%b) {api_version = 4 : i32,\n"
           "      has_side_effect = true}\n"
           "      : (tensor<ui32>, tensor<i32>) -> (tensor<4xf32>, tensor<i32>)\n"
           "    %%d = stablehlo.custom_call @mpi_cuda_wait_send(%%s, %%c) {api_version = 4 : i32,\n"
           "      has_side_effect = true} : (tensor<ui32>, tensor<i32>) -> tensor<i32>\n"
           "    return %%y : tensor<4xf32>\n"
           "  }\n"
           "}\n",
           1 - rank, 1 - rank);
  return text;
}

/* What the framework's own XLA has to partition. */
static void (*partitioned)(void *result, int failed, const char *bytes, size_t size);
static const char *answer;
static int answer_fails;
static size_t asked;

static void partition(const char *code, size_t code_size, const char *options, size_t options_size,
                      void *result) {
  asked = code_size;
  check(code && options && options_size > 0, "the partitioner gets the program and options");
  if (answer) partitioned(result, answer_fails, answer, strlen(answer));
}

/* Compiles a program that calls the target, for both ranks' devices. */
static void compile_for_both(PJRT_Client *client, const char *target, char *error, size_t capacity) {
  /* As in compile_options, with two partitions and use_spmd_partitioning (6). */
  unsigned char options[] = {0x1a, 22, 0x20, 1, 0x28, 2, 0x30, 1, 0x4a, 14, 0x08, 1,
                             0x10, 2, 0x1a, 3, 0x0a, 1, 0, 0x1a, 3, 0x0a, 1, 1};
  PJRT_Program code = {.struct_size = PJRT_Program_STRUCT_SIZE};
  code.code = (char *)program(target, "");
  code.code_size = strlen(code.code);
  code.format = "mlir";
  code.format_size = 4;
  PJRT_Client_Compile_Args args = {.struct_size = PJRT_Client_Compile_Args_STRUCT_SIZE};
  args.client = client;
  args.program = &code;
  args.compile_options = (char *)options;
  args.compile_options_size = sizeof options;
  asked = 0;
  error[0] = 0;
  take_error(api->PJRT_Client_Compile(&args), error, capacity);
}

static void partitioner(PJRT_Client *client, void *library) {
  void (*set)(void *) = (void (*)(void *))dlsym(library, "mpi_cuda_set_partitioner");
  partitioned =
      (void (*)(void *, int, const char *, size_t))dlsym(library, "mpi_cuda_partitioned");
  char text[4096];
  compile_for_both(client, "InspectSharding", text, sizeof text);
  check(strstr(text, "InspectSharding") && strstr(text, "mpi_cuda_set_partitioner"),
        "without a partitioner its programs are refused");
  set((void *)partition);
  compile_for_both(client, "InspectSharding", text, sizeof text);
  check(asked && strstr(text, "it has given nothing"), "a partitioner may give nothing");
  answer = "no rule";
  answer_fails = 1;
  compile_for_both(client, "InspectSharding", text, sizeof text);
  check(asked && strstr(text, "InspectSharding") && strstr(text, "no rule"),
        "what a partitioner says is the error");
  answer_fails = 0;
  compile_for_both(client, "InspectSharding", text, sizeof text);
  check(asked && text[0], "what is no module is refused");
  compile_for_both(client, "their_call", text, sizeof text);
  check(!asked, "other programs are the inner plugin's");

  /* The extension by which a framework names its custom calls (type 3, see pjrt_c_api.h). */
  struct registration {
    size_t struct_size;
    const char *name;
    size_t name_size;
    void *callbacks;
  } call = {sizeof call, "their_call", 10, NULL};
  struct extension {
    size_t struct_size;
    PJRT_Extension_Type type;
    PJRT_Extension_Base *next;
    PJRT_Error *(*custom)(struct registration *);
  } *found = (struct extension *)api->extension_start;
  while (found && found->type != PJRT_Extension_Type_Custom_Partitioner)
    found = (struct extension *)found->next;
  check(found != NULL, "the extension is there");
  if (found) must(found->custom(&call), "register a custom partitioner");
  compile_for_both(client, "their_call", text, sizeof text);
  check(asked, "what is registered is the framework's");
  set(NULL);
}

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const PJRT_Api *(*get)(void) = (const PJRT_Api *(*)(void))dlsym(library, "GetPjrtApi");
  int (*start)(int *, int *, const char **) =
      (int (*)(int *, int *, const char **))dlsym(library, "mpi_cuda_start");
  const char *(*last_error)(void) = (const char *(*)(void))dlsym(library, "mpi_cuda_last_error");
  void (*shutdown)(void) = (void (*)(void))dlsym(library, "mpi_cuda_shutdown");
  api = get();
  const char *family;
  if (start(&rank, &size, &family)) {
    fprintf(stderr, "%s\n", last_error());
    return 1;
  }
  check(size == 2, "two ranks");

  PJRT_Plugin_Initialize_Args init = {.struct_size = PJRT_Plugin_Initialize_Args_STRUCT_SIZE};
  must(api->PJRT_Plugin_Initialize(&init), "initialize");

  char text[4096];
  /* A wrong create option is an error of ours, readable and destroyable. */
  PJRT_NamedValue option = {.struct_size = PJRT_NamedValue_STRUCT_SIZE};
  option.name = "topology";
  option.name_size = strlen(option.name);
  option.type = PJRT_NamedValue_kString;
  option.string_value = "flat";
  option.value_size = 4;
  PJRT_Client_Create_Args create = {.struct_size = PJRT_Client_Create_Args_STRUCT_SIZE};
  create.create_options = &option;
  create.num_options = 1;
  check(take_error(api->PJRT_Client_Create(&create), text, sizeof text) &&
            strstr(text, "MPI_CUDA_TOPOLOGY=flat") && strstr(text, "global, local"),
        "a wrong create option is refused with the right values");

  option.name = "inner_plugin";
  option.name_size = strlen(option.name);
  option.string_value = "/other.so";
  option.value_size = strlen(option.string_value);
  check(take_error(api->PJRT_Client_Create(&create), text, sizeof text) &&
            strstr(text, "MPI_CUDA_INNER_PLUGIN"),
        "an inner plugin other than the loaded one is refused");

  PJRT_NamedValue options[] = {option, option};
  options[0].name = "topology";
  options[0].name_size = strlen(options[0].name);
  options[0].string_value = "global";
  options[0].value_size = 6;
  /* What frameworks give to a library with "cuda" in its name. */
  options[1].name = "memory_fraction";
  options[1].name_size = strlen(options[1].name);
  options[1].type = PJRT_NamedValue_kFloat;
  options[1].float_value = 0.5f;
  options[1].value_size = 1;
  create.create_options = options;
  create.num_options = 2;
  must(api->PJRT_Client_Create(&create), "create client with an option of GPUs");
  PJRT_Client *client = create.client;

  PJRT_Client_ProcessIndex_Args index = {.struct_size = PJRT_Client_ProcessIndex_Args_STRUCT_SIZE};
  index.client = client;
  must(api->PJRT_Client_ProcessIndex(&index), "process index");
  check(index.process_index == rank, "the process index is the rank");

  PJRT_Client_Devices_Args devices = {.struct_size = PJRT_Client_Devices_Args_STRUCT_SIZE};
  devices.client = client;
  must(api->PJRT_Client_Devices(&devices), "devices");
  check((int)devices.num_devices == size, "one device for every rank");
  PJRT_Client_AddressableDevices_Args own = {
      .struct_size = PJRT_Client_AddressableDevices_Args_STRUCT_SIZE};
  own.client = client;
  must(api->PJRT_Client_AddressableDevices(&own), "addressable devices");
  check(own.num_addressable_devices == 1 && own.addressable_devices[0] == devices.devices[rank],
        "each rank addresses its own device");

  const float data[] = {1 + rank, 2 + rank, 3 + rank, 4 + rank};
  float result[4] = {0};
  PJRT_Buffer *x, *other;
  must(to_device(client, own.addressable_devices[0], data, &x), "to device");
  check(take_error(to_device(client, devices.devices[1 - rank], data, &other), text, sizeof text) &&
            strstr(text, "belongs to rank"),
        "a buffer for another rank's device is refused");
  devices_of_others(client, devices.devices);
  places(client, x);
  ahead(client, x);

  run(compile(client, program("mpi_cuda_allreduce", "comm = 0 : i64, op = 0 : i64")), x, result,
      text, sizeof text);
  check(text[0] == 0 && result[0] == 3 && result[3] == 9, "allreduce adds");

  run(compile(client, pair()), x, result, text, sizeof text);
  if (rank == 0)
    check(text[0] == 0 && result[0] == 2 && result[3] == 8, "rank 0 gets back twice what it sent");
  else
    check(text[0] == 0 && result[0] == 1 && result[3] == 4, "rank 1 gets what rank 0 sent");

  run(compile(client, halves()), x, result, text, sizeof text);
  check(text[0] == 0 && result[0] == 2 - rank && result[3] == 5 - rank,
        "messages in two halves cross");

  run(compile(client, program("mpi_cuda_allreduce", "op = 8 : i64")), x, result, text, sizeof text);
  check(strstr(text, "allreduce of float32[4] with BOR") && strstr(text, "there is no BOR of float32"),
        "an impossible reduction is an error that names all");

  run(compile(client, program("mpi_cuda_bcast", "root = 5 : i64")), x, result, text, sizeof text);
  check(strstr(text, "root 5 is not a rank") != NULL, "a wrong root is an error");

  run(compile(client, program("mpi_cuda_allreduce", "comm = 0 : i64, op = 3 : i64")), x, result,
      text, sizeof text);
  check(text[0] == 0 && result[0] == 2, "after errors all goes on");

  partitioner(client, library);
  share_all(client, own.addressable_devices[0]);
  donate(client, x);

  PJRT_Client_Destroy_Args destroy = {.struct_size = PJRT_Client_Destroy_Args_STRUCT_SIZE};
  destroy.client = client;
  destroy_buffer(x);
  must(api->PJRT_Client_Destroy(&destroy), "destroy client");
  shutdown();
  if (rank == 0 || failed) printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

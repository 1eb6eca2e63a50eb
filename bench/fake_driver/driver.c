// A CUDA driver that runs nothing and records every launch, for measuring and testing launchers without a GPU.
//
// A launch is one line: kernel, grid, block, shared memory, then the kernel's arguments in hexadecimal, whose sizes are
// those that the compiler wrote into the binary.
#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  char name[256];
  int count;
  uint16_t sizes[512];
} Function;

typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
} Config;

static FILE* record;                       // where launches go; NULL: nowhere
static long launches;
static int failure;                        // what the next launches return

void fake_record(const char* path) {
  if (record) fclose(record);
  record = path && *path ? fopen(path, "w") : NULL;
}
long fake_launches(void) { return launches; }
void fake_fail(int error) { failure = error; }

int cuInit(unsigned flags) { return 100; }  // to the CUDA runtime there is no device; Triton does not ask
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 75: *value = 9; break;                                  // compute capability
    case 76: *value = 0; break;
    case 16: *value = 132; break;                                // multiprocessors
    case 8: *value = 48 << 10; break;                            // shared memory of a block, of one that asks, of all
    case 97: *value = 227 << 10; break;
    case 81: *value = 228 << 10; break;
    default: *value = 1 << 16;
  }
  return 0;
}
int cuGetErrorString(int error, const char** text) { return *text = "an error", 0; }
int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) { return *(uint64_t*)data = pointer, 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { return *value = attribute == 0 ? 1024 : 0, 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuModuleUnload(void* module) { return 0; }
int cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) { return *count = 1, 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }

int cuModuleLoadData(void** module, const void* image) { return *module = (void*)image, 0; }

// The sizes of a kernel's parameters: entries KPARAM_INFO of its section .nv.info.NAME.
int cuModuleGetFunction(void** function, void* module, const char* name) {
  const char* image = module;
  const Elf64_Ehdr* header = module;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + header->e_shoff);
  const char* names = image + sections[header->e_shstrndx].sh_offset;
  Function* made = calloc(1, sizeof(Function));
  snprintf(made->name, sizeof made->name, "%s", name);
  char wanted[300];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (strcmp(names + sections[i].sh_name, wanted)) continue;
    const unsigned char* at = (const unsigned char*)image + sections[i].sh_offset;
    const unsigned char* end = at + sections[i].sh_size;
    while (at + 4 <= end) {
      const unsigned format = at[0], attribute = at[1], size = at[2] | at[3] << 8;
      const unsigned char* payload = at + 4;
      at += format == 4 ? 4 + size : 4;
      if (format != 4 || attribute != 0x17) continue;
      uint16_t ordinal;
      uint32_t flags;
      memcpy(&ordinal, payload + 4, 2);
      memcpy(&flags, payload + 8, 4);
      made->sizes[ordinal] = flags >> 18;
      if (ordinal >= made->count) made->count = ordinal + 1;
    }
  }
  return *function = made, 0;
}

int cuLaunchKernelEx(const Config* config, void* handle, void** arguments, void** extra) {
  if (failure) return failure;
  ++launches;
  if (!record) return 0;
  const Function* function = handle;
  fprintf(record, "%s %u,%u,%u %u,%u,%u %u", function->name, config->grid[0], config->grid[1], config->grid[2],
          config->block[0], config->block[1], config->block[2], config->shared);
  for (int i = 0; i < function->count; ++i) {
    fputc(' ', record);
    for (int byte = function->sizes[i] - 1; byte >= 0; --byte)
      fprintf(record, "%02x", ((unsigned char*)arguments[i])[byte]);
  }
  fputc('\n', record);
  fflush(record);
  return 0;
}

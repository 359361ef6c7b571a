/* What the agent asks of NVIDIA's library, answered from files, so that the agent's own path through it is tested without a GPU.
   Two GPUs. $EVERLIT_FAKE_NVML is a folder: `xid` ("GPU NUMBER") is an error that is told once; `holders-GPU` lists processes that hold
   its memory as long as they live; `lost` ("GPU") is one that is not there any more. Layouts are those of nvml.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, TIMEOUT = 10, LOST = 15, XID_CRITICAL = 8 };
enum { GPUS = 2 };

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { void *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } event_data;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process_info;

static int gpus[GPUS] = {0, 1};
static int watched[GPUS];

static FILE *open_file(const char *name) {
  char path[4096];
  const char *folder = getenv("EVERLIT_FAKE_NVML");
  if (!folder) return NULL;
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return fopen(path, "r");
}

static int lost(void) {
  int gpu = -1;
  FILE *file = open_file("lost");
  if (file && fscanf(file, "%d", &gpu) != 1) gpu = -1;
  if (file) fclose(file);
  return gpu;
}

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == TIMEOUT ? "timeout" : "an error of the fake"; }

int nvmlDeviceGetCount_v2(unsigned *count) { *count = GPUS; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  if (index >= GPUS) return 2;
  *device = &gpus[index];
  return SUCCESS;
}
int nvmlDeviceGetName(void *device, char *name, unsigned length) { (void)device; snprintf(name, length, "Fake GPU"); return SUCCESS; }
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) { snprintf(uuid, length, "GPU-fake-%d", *(int *)device); return SUCCESS; }
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2 *memory) {
  if (*(int *)device == lost()) return LOST;
  memory->total = memory->free = 8ull << 30;
  memory->reserved = memory->used = 0;
  return SUCCESS;
}

int nvmlDeviceGetSupportedEventTypes(void *device, unsigned long long *types) { (void)device; *types = XID_CRITICAL; return SUCCESS; }
int nvmlEventSetCreate(void **set) { *set = watched; return SUCCESS; }
int nvmlEventSetFree(void *set) { (void)set; memset(watched, 0, sizeof watched); return SUCCESS; }
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
  if (set != watched || types != XID_CRITICAL) return NOT_SUPPORTED;
  watched[*(int *)device] = 1;
  return SUCCESS;
}
int nvmlEventSetWait_v2(void *set, event_data *data, unsigned timeout_ms) {
  (void)set;
  for (unsigned waited = 0; waited < timeout_ms; waited += 5) {
    int gpu, number;
    FILE *file = open_file("xid");
    int found = file && fscanf(file, "%d %d", &gpu, &number) == 2;
    if (file) fclose(file);
    if (found && gpu >= 0 && gpu < GPUS && watched[gpu]) {
      char path[4096];
      snprintf(path, sizeof path, "%s/xid", getenv("EVERLIT_FAKE_NVML"));
      unlink(path);
      memset(data, 0, sizeof *data);
      data->device = &gpus[gpu];
      data->type = XID_CRITICAL;
      data->data = (unsigned long long)number;
      return SUCCESS;
    }
    if (lost() >= 0 && watched[lost()]) return LOST;
    usleep(5000);
  }
  return TIMEOUT;
}

/* A zombie holds nothing. */
static int lives(unsigned pid) {
  char path[64], state = 'Z';
  snprintf(path, sizeof path, "/proc/%u/stat", pid);
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  if (fscanf(file, "%*d (%*[^)]) %c", &state) != 1) state = 'Z';
  fclose(file);
  return state != 'Z' && state != 'X';
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_info *processes) {
  char name[32];
  unsigned pid, found = 0, room = processes ? *count : 0;
  snprintf(name, sizeof name, "holders-%d", *(int *)device);
  FILE *file = open_file(name);
  while (file && fscanf(file, "%u", &pid) == 1) {
    if (!lives(pid)) continue;
    if (found < room) {
      memset(&processes[found], 0, sizeof processes[found]);
      processes[found].pid = pid;
    }
    found++;
  }
  if (file) fclose(file);
  *count = found;
  return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

/* A stand-in for libnvidia-ml.so.1: the calls that launchkit makes, answered from the environment.
 *
 * FAKE_NVML         GPUs separated by ';', their fields by ',':
 *                   name, memory MiB, used MiB, compute capability, PCIe generation, PCIe lanes, links, MIG
 *     links         '-' none; otherwise one letter per active link: 's' to a switch, a digit to that GPU
 *     MIG           '-' mode off; '+' on without slices; otherwise slices 'profile:MiB' joined by '+'
 * FAKE_NVML_P2P     'no' refuses peer-to-peer, 'mute' gives no answer, anything else grants it
 * FAKE_NVML_OLD     set: a driver without the second version of the memory call
 * FAKE_NVML_HEALTH  of GPU 0: uncorrected errors, compute mode, persistence, a process: '2,3,0,4242'
 * FAKE_NVML_INIT    an error number that initialisation returns
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SUCCESS 0
#define INVALID_ARGUMENT 2
#define NOT_SUPPORTED 3
#define NOT_FOUND 6
#define INSUFFICIENT_SIZE 7
#define FUNCTION_NOT_FOUND 13
#define ARGUMENT_VERSION_MISMATCH 25
#define MAX_GPUS 8
#define MAX_SLICES 7
#define MIB (1024ULL * 1024ULL)
#define RESERVED_MIB 500ULL

typedef struct {
    int index, parent; /* parent: -1 for a whole GPU */
    char name[128], uuid[96], links[40], mig[160];
    unsigned long long memory_mib, used_mib;
    int major, minor, pcie_generation, pcie_lanes;
} Device;

typedef struct {
    char bus_id_legacy[16];
    unsigned int domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} PciInfo;

typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu_instance, compute_instance; } ProcessInfo;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } MemoryV2;

static Device gpus[MAX_GPUS];
static Device slices[MAX_GPUS][MAX_SLICES];
static int num_gpus, num_slices[MAX_GPUS];

static void read_slices(int index) {
    char copy[160], *rest = copy, *entry;
    num_slices[index] = 0;
    snprintf(copy, sizeof copy, "%s", gpus[index].mig);
    if (copy[0] == '-') return;
    while ((entry = strsep(&rest, "+")) != NULL && num_slices[index] < MAX_SLICES) {
        Device *slice = &slices[index][num_slices[index]];
        char profile[32];
        if (sscanf(entry, "%31[^:]:%llu", profile, &slice->memory_mib) != 2) continue;
        slice->index = num_slices[index]++;
        slice->parent = index;
        slice->used_mib = 0;
        snprintf(slice->name, sizeof slice->name, "%.80s MIG %s", gpus[index].name, profile);
        snprintf(slice->uuid, sizeof slice->uuid, "MIG-%d%d-slice", index, slice->index);
    }
}

static void read_environment(void) {
    const char *text = getenv("FAKE_NVML");
    char *copy = strdup(text ? text : ""), *rest = copy, *entry;
    num_gpus = 0;
    while ((entry = strsep(&rest, ";")) != NULL && num_gpus < MAX_GPUS) {
        Device *gpu = &gpus[num_gpus];
        int fields = sscanf(entry, "%95[^,],%llu,%llu,%d.%d,%d,%d,%39[^,],%159s", gpu->name, &gpu->memory_mib,
                            &gpu->used_mib, &gpu->major, &gpu->minor, &gpu->pcie_generation, &gpu->pcie_lanes,
                            gpu->links, gpu->mig);
        if (fields != 9) continue;
        gpu->index = num_gpus;
        gpu->parent = -1;
        snprintf(gpu->uuid, sizeof gpu->uuid, "GPU-%c%cfake", 'a' + num_gpus, 'a' + num_gpus);
        read_slices(num_gpus++);
    }
    free(copy);
}

static void fill_pci(int index, PciInfo *info) {
    memset(info, 0, sizeof *info);
    snprintf(info->bus_id, sizeof info->bus_id, "00000000:%02X:00.0", 0x1A + index);
}

int nvmlInitWithFlags(unsigned int flags) {
    const char *error = getenv("FAKE_NVML_INIT");
    (void)flags;
    if (error) return atoi(error);
    read_environment();
    return SUCCESS;
}

int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == NOT_SUPPORTED ? "Not Supported" : "Fake Error"; }

int nvmlSystemGetDriverVersion(char *text, unsigned int length) {
    snprintf(text, length, "550.54.15");
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12040; return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = (unsigned int)num_gpus; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device) {
    if ((int)index >= num_gpus) return INVALID_ARGUMENT;
    *device = &gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetName(Device *device, char *text, unsigned int length) {
    snprintf(text, length, "%s", device->name);
    return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *text, unsigned int length) {
    snprintf(text, length, "%s", device->uuid);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    memory->total = device->memory_mib * MIB;
    memory->used = (device->used_mib + RESERVED_MIB) * MIB;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *memory) {
    if (getenv("FAKE_NVML_OLD")) return FUNCTION_NOT_FOUND;
    if (memory->version != (sizeof *memory | 2U << 24)) return ARGUMENT_VERSION_MISMATCH;
    memory->total = device->memory_mib * MIB;
    memory->reserved = RESERVED_MIB * MIB;
    memory->used = device->used_mib * MIB;
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
    *major = device->major;
    *minor = device->minor;
    return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(Device *device, PciInfo *info) { fill_pci(device->index, info); return SUCCESS; }

int nvmlDeviceGetMaxPcieLinkGeneration(Device *device, unsigned int *generation) {
    if (device->pcie_generation == 0) return NOT_SUPPORTED;
    *generation = (unsigned int)device->pcie_generation;
    return SUCCESS;
}

int nvmlDeviceGetCurrPcieLinkWidth(Device *device, unsigned int *lanes) {
    if (device->pcie_lanes == 0) return NOT_SUPPORTED;
    *lanes = (unsigned int)device->pcie_lanes;
    return SUCCESS;
}

static int link_end(Device *device, unsigned int link) {
    return device->links[0] != '-' && link < strlen(device->links) ? device->links[link] : 0;
}

int nvmlDeviceGetNvLinkState(Device *device, unsigned int link, unsigned int *active) {
    if (device->links[0] == '-') return NOT_SUPPORTED;
    *active = link_end(device, link) != 0;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(Device *device, unsigned int link, unsigned int *type) {
    int end = link_end(device, link);
    if (!end) return INVALID_ARGUMENT;
    *type = end == 's' ? 2 : 0;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(Device *device, unsigned int link, PciInfo *info) {
    int end = link_end(device, link);
    if (!end) return INVALID_ARGUMENT;
    fill_pci(end == 's' ? 100 : end - '0', info);
    return SUCCESS;
}

int nvmlDeviceGetTopologyCommonAncestor(Device *first, Device *second, unsigned int *level) {
    *level = first->index / 2 == second->index / 2 ? 10 : 50;
    return SUCCESS;
}

int nvmlDeviceGetP2PStatus(Device *first, Device *second, unsigned int index, unsigned int *status) {
    const char *answer = getenv("FAKE_NVML_P2P");
    (void)first, (void)second;
    if (index != 0) return INVALID_ARGUMENT;
    if (answer && strcmp(answer, "mute") == 0) return NOT_SUPPORTED;
    *status = answer && strcmp(answer, "no") == 0 ? 5 : 0;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Device *device, unsigned int *current, unsigned int *pending) {
    *current = *pending = device->mig[0] != '-';
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned int *count) {
    *count = device->mig[0] != '-' ? MAX_SLICES : 0;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned int number, Device **slice) {
    if ((int)number >= num_slices[device->index]) return NOT_FOUND;
    *slice = &slices[device->index][number];
    return SUCCESS;
}

static int health(Device *device, int field, unsigned long long *value) {
    unsigned long long fields[4];
    const char *text = getenv("FAKE_NVML_HEALTH");
    if (!text || device->index != 0) return NOT_SUPPORTED;
    if (sscanf(text, "%llu,%llu,%llu,%llu", &fields[0], &fields[1], &fields[2], &fields[3]) != 4) return NOT_SUPPORTED;
    *value = fields[field];
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(Device *device, unsigned int type, unsigned int counter, unsigned long long *count) {
    (void)counter;
    return type == 1 ? health(device, 0, count) : INVALID_ARGUMENT;
}

int nvmlDeviceGetComputeMode(Device *device, unsigned int *mode) {
    unsigned long long value = 0;
    int status = health(device, 1, &value);
    *mode = (unsigned int)value;
    return status;
}

int nvmlDeviceGetPersistenceMode(Device *device, unsigned int *mode) {
    unsigned long long value = 0;
    int status = health(device, 2, &value);
    *mode = (unsigned int)value;
    return status;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned int *count, ProcessInfo *processes) {
    unsigned long long pid = 0;
    int status = health(device, 3, &pid);
    if (status != SUCCESS) return status;
    if (processes == NULL) {
        *count = 1;
        return INSUFFICIENT_SIZE;
    }
    *count = 1;
    memset(processes, 0, sizeof *processes);
    processes->pid = (unsigned int)pid;
    return SUCCESS;
}

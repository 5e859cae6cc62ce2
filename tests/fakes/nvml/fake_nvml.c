/* A stand-in for libnvidia-ml.so.1, for tests on machines without a GPU. It reads the file named by FAKE_NVML_CONFIG: lines key=value, the bare
 * line `gpu` opens a device. No file: init answers 9 (driver not loaded), as a broken node does. Values and structures are nvml.h's.
 * Global keys: driver, cuda, init_error. Per GPU:
 *   name uuid bus_id cc total free reserved (0: memory is NotSupported) device_id, mig (-1: NotSupported), cores, clock (MHz; 0: NotSupported)
 *   nvlinks, peers (indices joined by NVLink, comma separated; absent: every GPU with links)
 *   ecc (uncorrected errors; -1: NotSupported), retired_pending, remap_pending, remap_failure, throttle (bits, hex)
 *   mig_slice=<uuid>,<MB>,<gpu instance>,<compute instance>,<name>, repeatable; their handles come with a hole before the second
 *   error, delay_ms: code or sleep of each call on this GPU; error_call, delay_call: of this call only; lost=1: no handle, code 15 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct gpu {
    char name[96], uuid[96], bus[32], peers[128], error_call[64], delay_call[64];
    int major, minor, mig, error, lost, links, has_peers, gi, ci, slices, retired_pending, remap_pending, remap_failure;
    unsigned device_id, delay_ms, cores, clock;
    long long ecc;
    unsigned long long total, free, reserved, throttle;
    struct gpu *parent, *slice[8];
} gpu;
typedef struct { unsigned long long total, free, used; } memory1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory2;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char text[32]; } pci;
typedef struct { unsigned multiprocessors, copy, decoder, encoder, jpeg, ofa, gpu_slices, compute_slices; unsigned long long mb; } attributes;

static gpu gpus[64], parts[64];
static unsigned count, part_count;
static int ready, init_error, cuda = 12040;
static char driver[80] = "550.163.01";

static void open_gpu(void) {
    gpu *g = &gpus[count];
    memset(g, 0, sizeof *g);
    g->major = 9;
    g->mig = -1;
    g->ecc = -1;
    strcpy(g->name, "NVIDIA H100 80GB HBM3");
    snprintf(g->uuid, sizeof g->uuid, "GPU-00000000-0000-0000-0000-%012u", count);
    snprintf(g->bus, sizeof g->bus, "00000000:%02X:00.0", 0x10 + count);
    count++;
}

static void open_slice(gpu *g, const char *value) {
    gpu *s = &parts[part_count];
    unsigned long long mb = 0;
    if (part_count >= 64 || g->slices >= 8) return;
    *s = *g;
    s->slices = 0;
    s->mig = -1;
    s->links = 0;
    if (sscanf(value, "%95[^,],%llu,%d,%d,%95[^\n]", s->uuid, &mb, &s->gi, &s->ci, s->name) < 4) return;
    s->total = mb << 20;
    s->free = s->total;
    s->parent = g;
    g->slice[g->slices++] = s;
    part_count++;
}

static void set(gpu *g, const char *key, const char *value) {
#define TEXT(k, field) else if (!strcmp(key, k)) snprintf(g->field, sizeof g->field, "%s", value)
#define NUMBER(k, field, base) else if (!strcmp(key, k)) g->field = strtoll(value, NULL, base)
    if (!strcmp(key, "cc")) sscanf(value, "%d.%d", &g->major, &g->minor);
    else if (!strcmp(key, "mig_slice")) open_slice(g, value);
    else if (!strcmp(key, "peers")) { snprintf(g->peers, sizeof g->peers, ",%s,", value); g->has_peers = 1; }
    TEXT("name", name); TEXT("uuid", uuid); TEXT("bus_id", bus); TEXT("error_call", error_call); TEXT("delay_call", delay_call);
    NUMBER("total", total, 10); NUMBER("free", free, 10); NUMBER("reserved", reserved, 10); NUMBER("device_id", device_id, 16);
    NUMBER("mig", mig, 10); NUMBER("error", error, 10); NUMBER("delay_ms", delay_ms, 10); NUMBER("lost", lost, 10);
    NUMBER("nvlinks", links, 10); NUMBER("cores", cores, 10); NUMBER("clock", clock, 10); NUMBER("ecc", ecc, 10);
    NUMBER("retired_pending", retired_pending, 10); NUMBER("remap_pending", remap_pending, 10); NUMBER("remap_failure", remap_failure, 10);
    NUMBER("throttle", throttle, 16);
}

static int load(void) {
    const char *path = getenv("FAKE_NVML_CONFIG");
    FILE *in = path ? fopen(path, "r") : NULL;
    char line[512];
    if (!in) return 9;
    count = part_count = 0;
    while (fgets(line, sizeof line, in)) {
        line[strcspn(line, "\r\n")] = 0;
        if (!strcmp(line, "gpu") && count < 64) { open_gpu(); continue; }
        char *value = strchr(line, '=');
        if (!value) continue;
        *value++ = 0;
        if (!strcmp(line, "driver")) snprintf(driver, sizeof driver, "%s", value);
        else if (!strcmp(line, "cuda")) cuda = atoi(value);
        else if (!strcmp(line, "init_error")) init_error = atoi(value);
        else if (count) set(&gpus[count - 1], line, value);
    }
    fclose(in);
    return init_error;
}

static int use(gpu *g, const char *call) {
    if (!ready) return 1;
    if (!((g >= gpus && g < gpus + count) || (g >= parts && g < parts + part_count))) return 2;
    if (g->delay_ms && (!*g->delay_call || !strcmp(call, g->delay_call))) usleep(g->delay_ms * 1000);
    return g->error && (!*g->error_call || !strcmp(call, g->error_call)) ? g->error : 0;
}
#define USE(g) int rc = use(g, __func__); if (rc) return rc

static int text(char *out, unsigned room, const char *value) {
    if (strlen(value) >= room) return 7;
    strcpy(out, value);
    return 0;
}

static int joined(gpu *a, gpu *b) {
    char key[16];
    if (!a->links || !b->links) return 0;
    snprintf(key, sizeof key, ",%d,", (int)(b - gpus));
    return !a->has_peers || strstr(a->peers, key) != NULL;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; int rc = load(); ready = rc == 0; return rc; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { ready = 0; return 0; }
const char *nvmlErrorString(int rc) {
    return rc == 9 ? "Driver Not Loaded" : rc == 15 ? "GPU is lost" : rc == 18 ? "Driver/library version mismatch" : "simulated failure";
}
int nvmlSystemGetDriverVersion(char *out, unsigned room) { return ready ? text(out, room, driver) : 1; }
int nvmlSystemGetNVMLVersion(char *out, unsigned room) { return ready ? text(out, room, "12.550.163.01") : 1; }
int nvmlSystemGetCudaDriverVersion(int *out) { *out = cuda; return ready ? 0 : 1; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { return nvmlSystemGetCudaDriverVersion(out); }
int nvmlDeviceGetCount(unsigned *out) { *out = count; return ready ? 0 : 1; }
int nvmlDeviceGetCount_v2(unsigned *out) { return nvmlDeviceGetCount(out); }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, gpu **out) {
    if (!ready) return 1;
    if (i >= count) return 2;
    if (gpus[i].lost) return 15;
    *out = &gpus[i];
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, gpu **out) {
    for (unsigned i = 0; i < count; i++) if (!strcmp(gpus[i].uuid, uuid)) return nvmlDeviceGetHandleByIndex_v2(i, out);
    return 6;
}
int nvmlDeviceGetIndex(gpu *g, unsigned *out) { USE(g); *out = (unsigned)((g->parent ? g->parent : g) - gpus); return 0; }
int nvmlDeviceGetName(gpu *g, char *out, unsigned room) { USE(g); return text(out, room, g->name); }
int nvmlDeviceGetUUID(gpu *g, char *out, unsigned room) { USE(g); return text(out, room, g->uuid); }
int nvmlDeviceGetMemoryInfo(gpu *g, memory1 *out) {
    USE(g);
    if (!g->total) return 3;
    out->total = g->total; out->free = g->free; out->used = g->total - g->free;
    return 0;
}
int nvmlDeviceGetMemoryInfo_v2(gpu *g, memory2 *out) {
    USE(g);
    if (out->version != 0x02000028) return 25;
    if (!g->total) return 3;
    out->total = g->total; out->free = g->free; out->reserved = g->reserved; out->used = g->total - g->free - g->reserved;
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(gpu *g, int *major, int *minor) { USE(g); *major = g->major; *minor = g->minor; return 0; }
int nvmlDeviceGetPciInfo_v3(gpu *g, pci *out) {
    USE(g);
    memset(out, 0, sizeof *out);
    sscanf(g->bus, "%x:%x:%x", &out->domain, &out->bus, &out->device);
    snprintf(out->legacy, sizeof out->legacy, "%04X:%02X:%02X.0", out->domain & 0xffff, out->bus & 0xff, out->device & 0xff);
    strcpy(out->text, g->bus);
    out->id = g->device_id;
    return 0;
}
int nvmlDeviceGetNumGpuCores(gpu *g, unsigned *out) { USE(g); *out = g->cores; return g->cores ? 0 : 3; }
int nvmlDeviceGetMaxClockInfo(gpu *g, int kind, unsigned *out) { USE(g); *out = g->clock; return g->clock && kind == 1 ? 0 : 3; }
int nvmlDeviceGetUtilizationRates(gpu *g, unsigned *out) { USE(g); out[0] = out[1] = 0; return 0; }

int nvmlDeviceGetMigMode(gpu *g, unsigned *current, unsigned *pending) {
    USE(g);
    if (g->mig < 0) return 3;
    *current = *pending = (unsigned)g->mig;
    return 0;
}
int nvmlDeviceIsMigDeviceHandle(gpu *g, unsigned *out) { USE(g); *out = g->parent != NULL; return 0; }
int nvmlDeviceGetMaxMigDeviceCount(gpu *g, unsigned *out) { USE(g); *out = g->mig < 0 ? 0 : 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(gpu *g, unsigned i, gpu **out) {
    USE(g);
    if (i == 1) return 6;
    if (i > 1) i--;
    if ((int)i >= g->slices) return 6;
    *out = g->slice[i];
    return 0;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(gpu *g, gpu **out) { USE(g); *out = g->parent; return g->parent ? 0 : 2; }
int nvmlDeviceGetGpuInstanceId(gpu *g, unsigned *out) { USE(g); *out = (unsigned)g->gi; return g->parent ? 0 : 3; }
int nvmlDeviceGetComputeInstanceId(gpu *g, unsigned *out) { USE(g); *out = (unsigned)g->ci; return g->parent ? 0 : 3; }
int nvmlDeviceGetAttributes_v2(gpu *g, attributes *out) {
    USE(g);
    if (!g->parent) return 3;
    memset(out, 0, sizeof *out);
    out->mb = g->total >> 20;
    return 0;
}

int nvmlDeviceGetNvLinkState(gpu *g, unsigned link, unsigned *out) { USE(g); *out = 1; return !g->links ? 3 : (int)link >= g->links ? 2 : 0; }
int nvmlDeviceGetP2PStatus(gpu *a, gpu *b, int kind, int *out) { USE(a); *out = kind == 2 && joined(a, b) && joined(b, a) ? 0 : 5; return 0; }

int nvmlDeviceGetTotalEccErrors(gpu *g, int kind, int counter, unsigned long long *out) {
    USE(g);
    if (g->ecc < 0) return 3;
    *out = kind == 1 && counter == 0 ? (unsigned long long)g->ecc : 0;
    return 0;
}
int nvmlDeviceGetRetiredPagesPendingStatus(gpu *g, unsigned *out) { USE(g); *out = (unsigned)g->retired_pending; return g->ecc < 0 ? 3 : 0; }
int nvmlDeviceGetRemappedRows(gpu *g, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failure) {
    USE(g);
    *corrected = *uncorrected = 0;
    *pending = (unsigned)g->remap_pending;
    *failure = (unsigned)g->remap_failure;
    return g->ecc < 0 ? 3 : 0;
}
int nvmlDeviceGetCurrentClocksEventReasons(gpu *g, unsigned long long *out) { USE(g); *out = g->throttle; return 0; }

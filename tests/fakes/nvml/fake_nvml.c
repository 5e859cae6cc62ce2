/* A stand-in for libnvidia-ml.so.1, for tests on machines without a GPU. It reads the file named by FAKE_NVML_CONFIG:
 * lines key=value, the bare line `gpu` opens a device. Global keys: driver, cuda, init_error. Per GPU: name uuid bus_id cc
 * total free reserved device_id mig error delay_ms. No file: init answers 9 (driver not loaded), as a broken node does. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    char name[96], uuid[96], bus[32];
    int major, minor, mig, error;
    unsigned device_id, delay_ms;
    unsigned long long total, free, reserved;
} gpu;
typedef struct { unsigned long long total, free, used; } memory1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory2;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char text[32]; } pci;

static gpu gpus[64];
static unsigned count;
static int ready, init_error, cuda = 12040;
static char driver[80] = "550.163.01";

static int load(void) {
    const char *path = getenv("FAKE_NVML_CONFIG");
    FILE *in = path ? fopen(path, "r") : NULL;
    char line[512];
    if (!in) return 9;
    count = 0;
    while (fgets(line, sizeof line, in)) {
        gpu *g = count ? &gpus[count - 1] : NULL;
        line[strcspn(line, "\r\n")] = 0;
        if (!strcmp(line, "gpu") && count < 64) {
            g = &gpus[count];
            memset(g, 0, sizeof *g);
            g->major = 9;
            g->mig = -1;
            strcpy(g->name, "NVIDIA H100 80GB HBM3");
            snprintf(g->uuid, sizeof g->uuid, "GPU-00000000-0000-0000-0000-%012u", count);
            snprintf(g->bus, sizeof g->bus, "00000000:%02X:00.0", 0x10 + count);
            count++;
            continue;
        }
        char *value = strchr(line, '=');
        if (!value) continue;
        *value++ = 0;
        if (!strcmp(line, "driver")) snprintf(driver, sizeof driver, "%s", value);
        else if (!strcmp(line, "cuda")) cuda = atoi(value);
        else if (!strcmp(line, "init_error")) init_error = atoi(value);
        else if (!g) continue;
        else if (!strcmp(line, "name")) snprintf(g->name, sizeof g->name, "%s", value);
        else if (!strcmp(line, "uuid")) snprintf(g->uuid, sizeof g->uuid, "%s", value);
        else if (!strcmp(line, "bus_id")) snprintf(g->bus, sizeof g->bus, "%s", value);
        else if (!strcmp(line, "cc")) sscanf(value, "%d.%d", &g->major, &g->minor);
        else if (!strcmp(line, "total")) g->total = strtoull(value, NULL, 10);
        else if (!strcmp(line, "free")) g->free = strtoull(value, NULL, 10);
        else if (!strcmp(line, "reserved")) g->reserved = strtoull(value, NULL, 10);
        else if (!strcmp(line, "device_id")) g->device_id = (unsigned)strtoul(value, NULL, 16);
        else if (!strcmp(line, "mig")) g->mig = atoi(value);
        else if (!strcmp(line, "error")) g->error = atoi(value);
        else if (!strcmp(line, "delay_ms")) g->delay_ms = (unsigned)atoi(value);
    }
    fclose(in);
    return init_error;
}

static int use(gpu *g) {
    if (!ready) return 1;
    if (g < gpus || g >= gpus + count) return 2;
    if (g->delay_ms) usleep(g->delay_ms * 1000);
    return g->error;
}

static int text(char *out, unsigned room, const char *value) {
    if (strlen(value) >= room) return 7;
    strcpy(out, value);
    return 0;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; int rc = load(); ready = rc == 0; return rc; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { ready = 0; return 0; }
const char *nvmlErrorString(int rc) { return rc == 9 ? "Driver Not Loaded" : rc == 18 ? "Driver/library version mismatch" : "simulated failure"; }
int nvmlSystemGetDriverVersion(char *out, unsigned room) { return ready ? text(out, room, driver) : 1; }
int nvmlSystemGetCudaDriverVersion(int *out) { *out = cuda; return ready ? 0 : 1; }
int nvmlSystemGetCudaDriverVersion_v2(int *out) { return nvmlSystemGetCudaDriverVersion(out); }
int nvmlDeviceGetCount(unsigned *out) { *out = count; return ready ? 0 : 1; }
int nvmlDeviceGetCount_v2(unsigned *out) { return nvmlDeviceGetCount(out); }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, gpu **out) { if (i >= count) return 2; *out = &gpus[i]; return ready ? 0 : 1; }
int nvmlDeviceGetName(gpu *g, char *out, unsigned room) { int rc = use(g); return rc ? rc : text(out, room, g->name); }
int nvmlDeviceGetUUID(gpu *g, char *out, unsigned room) { int rc = use(g); return rc ? rc : text(out, room, g->uuid); }
int nvmlDeviceGetMemoryInfo(gpu *g, memory1 *out) {
    int rc = use(g);
    if (rc) return rc;
    if (!g->total) return 3;
    out->total = g->total; out->free = g->free; out->used = g->total - g->free;
    return 0;
}
int nvmlDeviceGetMemoryInfo_v2(gpu *g, memory2 *out) {
    int rc = use(g);
    if (rc) return rc;
    if (out->version != 0x02000028) return 25;
    if (!g->total) return 3;
    out->total = g->total; out->free = g->free; out->reserved = g->reserved; out->used = g->total - g->free - g->reserved;
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(gpu *g, int *major, int *minor) { int rc = use(g); *major = g->major; *minor = g->minor; return rc; }
int nvmlDeviceGetPciInfo_v3(gpu *g, pci *out) {
    int rc = use(g);
    if (rc) return rc;
    memset(out, 0, sizeof *out);
    sscanf(g->bus, "%x:%x:%x", &out->domain, &out->bus, &out->device);
    snprintf(out->legacy, sizeof out->legacy, "%04X:%02X:%02X.0", out->domain & 0xffff, out->bus & 0xff, out->device & 0xff);
    strcpy(out->text, g->bus);
    out->id = g->device_id;
    return 0;
}
int nvmlDeviceGetMigMode(gpu *g, unsigned *current, unsigned *pending) {
    int rc = use(g);
    if (rc) return rc;
    if (g->mig < 0) return 3;
    *current = *pending = (unsigned)g->mig;
    return 0;
}

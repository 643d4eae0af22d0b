// A driver of two devices, or of none: what cudarc asks of libcuda.so.1 to describe them.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static int count(void) {
    const char *count = getenv("FAKE_CUDA_DEVICES");
    return count ? atoi(count) : 0;
}
int cuInit(unsigned flags) { (void)flags; return count() < 0 ? 999 : count() == 0 ? 100 : 0; }
int cuDeviceGetCount(int *out) { *out = count(); return 0; }
int cuDeviceGet(int *out, int ordinal) { *out = ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    (void)device;
    strncpy(name, "Fake H100", (size_t)length);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = (size_t)80 << 30; return 0; }
int cuDeviceGetAttribute(int *out, int attribute, int device) {
    (void)device;
    *out = attribute == 75 ? 9 : 0; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    return 0;
}

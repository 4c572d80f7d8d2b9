// Stands in for libcuda.so.1 in test_cuda_driver.py: prints what it is asked, and fails where FAKE_CUDA says so.
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

int handle;

const char* setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

int result_of(const char* function) { return std::strcmp(setting("FAKE_CUDA_FAILS", ""), function) == 0 ? 700 : 0; }

}  // namespace

extern "C" {

int cuInit(unsigned) { return result_of("cuInit"); }
int cuDeviceGetCount(int* count) { return *count = std::atoi(setting("FAKE_CUDA_DEVICES", "2")), 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = 10 + ordinal, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = std::atoi(setting("FAKE_CUDA_CAPABILITY", "61"));
  return *value = attribute == 75 ? capability / 10 : capability % 10, 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  std::printf("retain %d\n", device);
  *context = reinterpret_cast<void*>(static_cast<long>(device));
  return result_of("cuDevicePrimaryCtxRetain");
}
int cuCtxPushCurrent_v2(void* context) {
  std::printf("push %ld\n", reinterpret_cast<long>(context));
  return 0;
}
int cuCtxPopCurrent_v2(void**) {
  std::printf("pop\n");
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  const char* bytes = static_cast<const char*>(image);
  std::printf("load %s\n", std::memcmp(bytes, "\177ELF", 4) == 0 ? "cubin"
                           : std::strstr(bytes, ".version")      ? "ptx"
                                                                 : "?");
  *module = &handle;
  return result_of("cuModuleLoadData");
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  std::printf("function %s\n", name);
  *function = &handle;
  return 0;
}
int cuLaunchKernel(void*, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** arguments, void**) {
  std::printf("launch grid %u %u %u block %u %u %u shared %u stream %ld x %ld rows %d channels %d eps %.3g\n", gx, gy,
              gz, bx, by, bz, shared, reinterpret_cast<long>(stream), *static_cast<long*>(arguments[0]),
              *static_cast<int*>(arguments[8]), *static_cast<int*>(arguments[9]), *static_cast<float*>(arguments[10]));
  return result_of("cuLaunchKernel");
}
int cuGetErrorString(int, const char** text) { return *text = "a made-up failure", 0; }
}

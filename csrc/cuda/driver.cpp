#include "driver.h"

#include <dlfcn.h>

#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace qvl::cuda {
namespace {

// The driver's ABI, as far as it is used here. Names with _v2 are what cuda.h maps the plain names to.
using Result = int;
using Device = int;
using Context = void*;
using Module = void*;
using Function = void*;
constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;  // CU_DEVICE_ATTRIBUTE_*

struct Driver {
  Result (*cuInit)(unsigned flags);
  Result (*cuDeviceGetCount)(int* count);
  Result (*cuDeviceGet)(Device* device, int ordinal);
  Result (*cuDeviceGetAttribute)(int* value, int attribute, Device device);
  Result (*cuDevicePrimaryCtxRetain)(Context* context, Device device);
  Result (*cuCtxPushCurrent_v2)(Context context);
  Result (*cuCtxPopCurrent_v2)(Context* context);
  Result (*cuModuleLoadData)(Module* module, const void* image);
  Result (*cuModuleGetFunction)(Function* function, Module module, const char* name);
  Result (*cuLaunchKernel)(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                           unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                           void** extra);
  Result (*cuGetErrorString)(Result result, const char** text);

  std::string failure;  // empty where the driver is usable

  static const Driver& instance() {
    static const Driver driver;
    return driver;
  }

  void check(Result result, const std::string& what) const {
    if (result == 0) return;
    const char* text = nullptr;
    cuGetErrorString(result, &text);
    throw std::runtime_error(what + ": " + (text ? text : "unknown error") + " (CUDA driver error " +
                             std::to_string(result) + ")");
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      failure = "the NVIDIA driver is not installed (libcuda.so.1 does not load)";
      return;
    }
    const auto bind = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr && failure.empty())
        failure = std::string("the NVIDIA driver is too old: it has no ") + name;
    };
    bind(cuInit, "cuInit");
    bind(cuDeviceGetCount, "cuDeviceGetCount");
    bind(cuDeviceGet, "cuDeviceGet");
    bind(cuDeviceGetAttribute, "cuDeviceGetAttribute");
    bind(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    bind(cuCtxPushCurrent_v2, "cuCtxPushCurrent_v2");
    bind(cuCtxPopCurrent_v2, "cuCtxPopCurrent_v2");
    bind(cuModuleLoadData, "cuModuleLoadData");
    bind(cuModuleGetFunction, "cuModuleGetFunction");
    bind(cuLaunchKernel, "cuLaunchKernel");
    bind(cuGetErrorString, "cuGetErrorString");
    if (!failure.empty()) return;
    int count = 0;
    if (const Result result = cuInit(0); result != 0)
      failure = "the NVIDIA driver does not start (cuInit returned " + std::to_string(result) + ")";
    else if (cuDeviceGetCount(&count) != 0 || count == 0)
      failure = "the NVIDIA driver finds no GPU";
  }
};

// The context is current between construction and destruction; the thread's own comes back.
class CurrentContext {
 public:
  CurrentContext(const Driver& driver, Context context) : driver_(driver) {
    driver_.check(driver_.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent");
  }
  ~CurrentContext() {
    Context context;
    driver_.cuCtxPopCurrent_v2(&context);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const Driver& driver_;
};

// A GPU's primary context, which the process then keeps, and the modules and functions loaded into it.
struct Gpu {
  Context context = nullptr;
  bool is_sm_61 = false;
  std::map<std::string, Module> modules;
  std::map<std::pair<std::string, std::string>, Function> functions;
};

std::mutex mutex;
std::string image_folder;
std::map<int, Gpu> gpus;

Gpu& gpu_of(const Driver& driver, int ordinal) {
  Gpu& gpu = gpus[ordinal];
  if (gpu.context != nullptr) return gpu;
  Device device;
  int major = 0, minor = 0;
  driver.check(driver.cuDeviceGet(&device, ordinal), "cuDeviceGet");
  driver.check(driver.cuDeviceGetAttribute(&major, kComputeCapabilityMajor, device), "cuDeviceGetAttribute");
  driver.check(driver.cuDeviceGetAttribute(&minor, kComputeCapabilityMinor, device), "cuDeviceGetAttribute");
  if (major < 6 || (major == 6 && minor < 1))
    throw std::runtime_error("GPU " + std::to_string(ordinal) + " has compute capability " + std::to_string(major) +
                             "." + std::to_string(minor) + "; 6.1 or newer is needed");
  driver.check(driver.cuDevicePrimaryCtxRetain(&gpu.context, device), "cuDevicePrimaryCtxRetain");
  gpu.is_sm_61 = major == 6 && minor == 1;
  return gpu;
}

// cuda_images in the folder of this very library.
std::string folder_beside_library() {
  Dl_info info;
  if (dladdr(&mutex, &info) == 0 || info.dli_fname == nullptr) return "cuda_images";
  const std::string path = info.dli_fname;
  const auto slash = path.rfind('/');
  return (slash == std::string::npos ? std::string() : path.substr(0, slash + 1)) + "cuda_images";
}

// A terminated copy: the driver reads PTX as a C string.
std::string read_image(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read the CUDA image " + path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

Function function_of(const Driver& driver, Gpu& gpu, const Plan& plan) {
  Function& function = gpu.functions[{plan.image, plan.kernel}];
  if (function != nullptr) return function;
  Module& module = gpu.modules[plan.image];
  if (module == nullptr) {
    const std::string folder = image_folder.empty() ? folder_beside_library() : image_folder;
    const std::string path = folder + "/" + plan.image + (gpu.is_sm_61 ? ".sm_61.cubin" : ".compute_61.ptx");
    driver.check(driver.cuModuleLoadData(&module, read_image(path).c_str()), "loading " + path);
  }
  driver.check(driver.cuModuleGetFunction(&function, module, plan.kernel), std::string("finding ") + plan.kernel);
  return function;
}

}  // namespace

void set_image_folder(std::string folder) {
  const std::lock_guard<std::mutex> lock(mutex);
  image_folder = std::move(folder);
}

std::string driver_status() { return Driver::instance().failure; }

void launch(const Plan& plan, int device, void* stream) {
  if (plan.grid.x == 0 || plan.grid.y == 0 || plan.grid.z == 0) return;
  const Driver& driver = Driver::instance();
  if (!driver.failure.empty()) throw std::runtime_error(driver.failure);
  Function function;
  Context context;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    Gpu& gpu = gpu_of(driver, device);
    context = gpu.context;
    const CurrentContext current(driver, context);
    function = function_of(driver, gpu, plan);
  }
  void* arguments[Plan::kMaxArguments];
  int count = 0;
  for (const Argument& argument : plan) arguments[count++] = const_cast<unsigned char*>(argument.bytes);
  const CurrentContext current(driver, context);
  driver.check(driver.cuLaunchKernel(function, plan.grid.x, plan.grid.y, plan.grid.z, plan.block.x, plan.block.y,
                                     plan.block.z, plan.shared_bytes, stream, arguments, nullptr),
               std::string("launching ") + plan.kernel);
}

}  // namespace qvl::cuda

#include "parallel.h"

#include <dlfcn.h>

#include <cstdio>

namespace qvl {
namespace {

template <class F>
bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

OpenMp look_up() {
  // dlsym on a handle searches the library and what it depends on: the answer is torch's OpenMP even where another one
  // (scikit-learn brings its own) was mapped before it. RTLD_NOLOAD: the handle of what is mapped, never a second copy.
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (torch == nullptr) return {};
  OpenMp omp;
  const bool complete =
      find(torch, "GOMP_parallel", omp.parallel) && find(torch, "omp_get_max_threads", omp.max_threads) &&
      find(torch, "omp_get_num_threads", omp.num_threads) && find(torch, "omp_get_thread_num", omp.thread_num) &&
      find(torch, "omp_in_parallel", omp.in_parallel);
  if (!complete) return {};
  if (Dl_info info; dladdr(reinterpret_cast<void*>(omp.parallel), &info))
    std::snprintf(omp.library, sizeof omp.library, "%s", info.dli_fname);
  return omp;
}

}  // namespace

const OpenMp& openmp() {
  static const OpenMp omp = look_up();
  return omp;
}

}  // namespace qvl

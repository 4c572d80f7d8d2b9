// Loops on torch's own OpenMP threads.
//
// The extension does not link an OpenMP library: two of them in one process would mean two pools fighting for the
// cores. Instead it looks up the one that torch has already mapped, whatever its file is called, and enters it through
// the GOMP ABI, which libgomp, LLVM's libomp and Intel's libiomp5 all export. `torch.set_num_threads` thus rules these
// loops too. Without an OpenMP library in the process the loops run on the calling thread.
#pragma once

#include <atomic>
#include <cstdint>

namespace qvl {

// Elements below which waking other threads costs more than it saves (about 5 us a loop, torch uses the same number).
constexpr std::int64_t kSerialElements = 32768;

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GOMP_parallel
  int (*max_threads)() = nullptr;                                          // omp_get_max_threads
  int (*num_threads)() = nullptr;                                          // omp_get_num_threads
  int (*thread_num)() = nullptr;                                           // omp_get_thread_num
  int (*in_parallel)() = nullptr;                                          // omp_in_parallel
  char library[512] = {};                                                  // path of the library, empty without one
};

// Found once per process (parallel.cpp).
const OpenMp& openmp();

// Calls body(begin, end) on disjoint ranges that cover [0, tasks). `work` is the number of elements that all tasks
// touch together. The body must not throw, and what it computes must not depend on how the tasks are split.
template <class Body>
void parallel_for(std::int64_t tasks, std::int64_t work, const Body& body) {
  if (tasks <= 0) return;
  const OpenMp& omp = openmp();
  if (tasks == 1 || work < kSerialElements || omp.parallel == nullptr || omp.in_parallel() || omp.max_threads() == 1) {
    body(std::int64_t{0}, tasks);
    return;
  }
  struct Shared {
    const Body& body;
    std::int64_t tasks;
    const OpenMp& omp;
  } shared{body, tasks, omp};
  const auto run = [](void* data) {
    const Shared& s = *static_cast<Shared*>(data);
    const std::int64_t threads = s.omp.num_threads(), me = s.omp.thread_num();
    const std::int64_t begin = s.tasks * me / threads, end = s.tasks * (me + 1) / threads;
    if (begin < end) s.body(begin, end);
  };
  const std::int64_t threads = omp.max_threads();
  omp.parallel(run, &shared, static_cast<unsigned>(threads < tasks ? threads : tasks), 0);
}

// Calls body(task, worker) for every task in [0, tasks), each once, in about rising order; a thread that is done takes
// the next. For tasks of unequal cost. `worker` < workers numbers the thread, for scratch memory of its own.
template <class Body>
void parallel_tasks(std::int64_t tasks, std::int64_t work, std::int64_t workers, const Body& body) {
  std::atomic<std::int64_t> next{0};
  parallel_for(tasks < workers ? tasks : workers, work, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t worker = begin; worker < end; ++worker)
      for (std::int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task, worker);
  });
}

}  // namespace qvl

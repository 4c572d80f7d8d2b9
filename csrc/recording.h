// Calls of kernels, to be made again without Python.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace qvl {

// Between `begin` and `end` every kernel that this thread launches (`launch` in bindings.h) is added with its
// arguments, and every tensor that a binding is given (tensor_caster.h) is kept alive: what a call reads and writes
// stays where it was. `replay` makes the calls again, in order, on the calling thread and without the GIL.
class Recording {
 public:
  static Recording*& current() {
    static thread_local Recording* recording = nullptr;
    return recording;
  }

  void begin() {
    if (current() != nullptr) throw std::runtime_error("Recording: this thread records already");
    current() = this;
  }
  void end() {
    if (current() == this) current() = nullptr;
  }
  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  void keep(pybind11::handle tensor) { kept_.push_back(pybind11::reinterpret_borrow<pybind11::object>(tensor)); }

  std::size_t size() const { return calls_.size(); }
  void replay() const {
    if (current() != nullptr) throw std::runtime_error("Recording: this thread records, it cannot replay");
    pybind11::gil_scoped_release release;
    for (const auto& call : calls_) call();
  }

 private:
  std::vector<std::function<void()>> calls_;
  std::vector<pybind11::object> kept_;
};

}  // namespace qvl

// What one launch is: image, kernel, grid, block, arguments. A pure function of shapes and pointers, made without a
// GPU, so that the tests run on an interpreter of PTX exactly what the driver would be given.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "row_layout.h"

namespace qvl::cuda {

// A kernel argument by value. `kind` names its type for Python: "pointer", "i32", "f32", or "bytes" for a struct.
struct Argument {
  const char* name;
  const char* kind;
  std::uint32_t size;
  alignas(8) unsigned char bytes[sizeof(RowLayout)];
};

struct Dim3 {
  std::uint32_t x = 1, y = 1, z = 1;
};

class Plan {
 public:
  static constexpr int kMaxArguments = 24;

  const char* image = "";          // stem of the .cu file
  const char* kernel = "";         // extern "C" name in it
  Dim3 grid, block;                // a grid with a zero in it launches nothing
  std::uint32_t shared_bytes = 0;  // dynamic; what a kernel declares itself comes on top

  // Appends an argument; the order is the kernel's.
  template <class T>
  Plan& add(const char* name, const T& value) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Argument::bytes));
    if (count_ == kMaxArguments) throw std::logic_error("a plan has too many arguments");
    Argument& argument = arguments_[count_++];
    argument.name = name;
    argument.kind = kind_of<T>();
    argument.size = sizeof(T);
    std::memcpy(argument.bytes, &value, sizeof(T));
    return *this;
  }
  const Argument* begin() const { return arguments_; }
  const Argument* end() const { return arguments_ + count_; }

 private:
  template <class T>
  static constexpr const char* kind_of() {
    if constexpr (std::is_pointer_v<T>) return "pointer";
    if constexpr (std::is_same_v<T, std::int32_t>) return "i32";
    if constexpr (std::is_same_v<T, float>) return "f32";
    return "bytes";
  }

  int count_ = 0;
  Argument arguments_[kMaxArguments];
};

}  // namespace qvl::cuda

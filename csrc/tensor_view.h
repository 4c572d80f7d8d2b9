// A tensor as the kernels see it: no torch header is needed to build, no torch version is tied to the binary.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace qvl {

enum class DType : std::uint8_t { f32, bf16, f16, f64, i8, u8, i32, i64, boolean };

constexpr int kMaxDims = 6;

// Sizes and strides are in elements. `data` is borrowed: the caller's Python tensor keeps it alive during the call.
struct TensorView {
  void* data = nullptr;
  std::int64_t size[kMaxDims] = {};
  std::int64_t stride[kMaxDims] = {};
  std::int32_t ndim = 0;
  std::int32_t device = -1;  // CUDA ordinal, or -1 for the CPU
  DType dtype = DType::f32;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= size[i];
    return n;
  }
};

// torch's dtype objects are singletons, so a dtype is recognised by the address of its Python object.
class DTypeTable {
 public:
  static const DTypeTable& instance() {
    static const DTypeTable table;
    return table;
  }
  DType find(PyObject* dtype) const {
    for (const Entry& e : entries_)
      if (e.object == dtype) return e.dtype;
    throw std::invalid_argument("unsupported dtype " + std::string(pybind11::str(reinterpret_cast<PyObject*>(dtype))));
  }

 private:
  struct Entry {
    PyObject* object;
    DType dtype;
  };
  static Entry entry(const pybind11::module_& torch, const char* name, DType dtype) {
    return {torch.attr(name).ptr(), dtype};  // torch keeps the object alive for the life of the process
  }
  DTypeTable() {
    const auto torch = pybind11::module_::import("torch");
    entries_[0] = entry(torch, "float32", DType::f32);
    entries_[1] = entry(torch, "bfloat16", DType::bf16);
    entries_[2] = entry(torch, "float16", DType::f16);
    entries_[3] = entry(torch, "float64", DType::f64);
    entries_[4] = entry(torch, "int8", DType::i8);
    entries_[5] = entry(torch, "uint8", DType::u8);
    entries_[6] = entry(torch, "int32", DType::i32);
    entries_[7] = entry(torch, "int64", DType::i64);
    entries_[8] = entry(torch, "bool", DType::boolean);
  }
  Entry entries_[9];
};

}  // namespace qvl

namespace pybind11::detail {

// Reads data_ptr(), shape, stride(), dtype and get_device() of anything that has them (0.3 us a tensor).
template <>
struct type_caster<qvl::TensorView> {
  PYBIND11_TYPE_CASTER(qvl::TensorView, const_name("torch.Tensor"));

  bool load(handle src, bool) {
    static PyObject* const kDataPtr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const kShape = PyUnicode_InternFromString("shape");
    static PyObject* const kStride = PyUnicode_InternFromString("stride");
    static PyObject* const kDType = PyUnicode_InternFromString("dtype");
    static PyObject* const kGetDevice = PyUnicode_InternFromString("get_device");

    const auto shape = reinterpret_steal<object>(PyObject_GetAttr(src.ptr(), kShape));
    if (!shape) return PyErr_Clear(), false;
    const auto pointer = reinterpret_steal<object>(PyObject_CallMethodNoArgs(src.ptr(), kDataPtr));
    const auto stride = reinterpret_steal<object>(PyObject_CallMethodNoArgs(src.ptr(), kStride));
    const auto dtype = reinterpret_steal<object>(PyObject_GetAttr(src.ptr(), kDType));
    const auto device = reinterpret_steal<object>(PyObject_CallMethodNoArgs(src.ptr(), kGetDevice));
    if (!pointer || !stride || !dtype || !device) throw error_already_set();

    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape.ptr());
    if (ndim > qvl::kMaxDims) throw std::invalid_argument("a tensor has more than 6 dimensions");
    value.data = PyLong_AsVoidPtr(pointer.ptr());
    value.ndim = static_cast<std::int32_t>(ndim);
    value.device = static_cast<std::int32_t>(PyLong_AsLong(device.ptr()));
    value.dtype = qvl::DTypeTable::instance().find(dtype.ptr());
    for (Py_ssize_t i = 0; i < ndim; ++i) {
      value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
    }
    return true;
  }
};

}  // namespace pybind11::detail

// From a Python tensor to a TensorView. Only the bindings include it: pybind11 takes seconds to compile, kernels need
// none of it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "recording.h"
#include "tensor_view.h"

namespace qvl {

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

// What a torch from 2.10 on tells about a tensor without one Python call: the table of C functions that DLPack 1.2 lays
// behind `torch.Tensor.__dlpack_c_exchange_api__`. 0.02 us a tensor instead of 0.3.
class DlPack {
 public:
  static const DlPack& instance() {
    static const DlPack table;
    return table;
  }
  // Fills `to` from a plain torch.Tensor or Parameter; false, with no Python error set, where this torch or this
  // object needs the attributes.
  bool view(PyObject* tensor, TensorView& to) const {
    if (read_ == nullptr || (Py_TYPE(tensor) != tensor_ && Py_TYPE(tensor) != parameter_)) return false;
    Tensor from;
    if (read_(tensor, &from) != 0) return PyErr_Clear(), false;
    if (from.device_type != kCpu && from.device_type != kCuda) return false;
    if (from.ndim > kMaxDims || from.lanes != 1 || !find(from, to.dtype)) return false;
    to.data = static_cast<char*>(from.data) + from.byte_offset;
    to.ndim = from.ndim;
    to.device = from.device_type == kCpu ? -1 : from.device_id;
    for (int i = 0; i < from.ndim; ++i) to.size[i] = from.shape[i], to.stride[i] = from.strides[i];
    return true;
  }

 private:
  enum { kCpu = 1, kCuda = 2 };
  struct Tensor {  // DLTensor
    void* data;
    std::int32_t device_type, device_id, ndim;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
  };
  struct Exchange {  // DLPackExchangeAPI, major version 1
    std::uint32_t major, minor;
    void* previous;
    void* owning[3];
    int (*view)(void*, Tensor*);
  };
  static bool find(const Tensor& t, DType& dtype) {
    enum { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
    switch (t.code << 8 | t.bits) {
      case kFloat << 8 | 32:
        return dtype = DType::f32, true;
      case kBfloat << 8 | 16:
        return dtype = DType::bf16, true;
      case kFloat << 8 | 16:
        return dtype = DType::f16, true;
      case kFloat << 8 | 64:
        return dtype = DType::f64, true;
      case kInt << 8 | 8:
        return dtype = DType::i8, true;
      case kUInt << 8 | 8:
        return dtype = DType::u8, true;
      case kInt << 8 | 32:
        return dtype = DType::i32, true;
      case kInt << 8 | 64:
        return dtype = DType::i64, true;
      case kBool << 8 | 8:
        return dtype = DType::boolean, true;
      default:
        return false;
    }
  }
  DlPack() {
    const auto torch = pybind11::module_::import("torch");
    tensor_ = reinterpret_cast<PyTypeObject*>(torch.attr("Tensor").ptr());  // torch keeps both types alive
    parameter_ = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
    const pybind11::object capsule =
        pybind11::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", pybind11::none());
    if (!PyCapsule_CheckExact(capsule.ptr())) return;
    const auto* table = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (table == nullptr) PyErr_Clear();
    if (table != nullptr && table->major == 1) read_ = table->view;
  }
  PyTypeObject *tensor_ = nullptr, *parameter_ = nullptr;
  int (*read_)(void*, Tensor*) = nullptr;
};

}  // namespace qvl

namespace pybind11::detail {

// By DLPack's C functions where this torch has them, else data_ptr(), shape, stride(), dtype and get_device() of
// anything that has them (0.3 us a tensor).
template <>
struct type_caster<qvl::TensorView> {
  PYBIND11_TYPE_CASTER(qvl::TensorView, const_name("torch.Tensor"));

  bool load(handle src, bool) {
    if (qvl::Recording* recording = qvl::Recording::current()) recording->keep(src);
    if (qvl::DlPack::instance().view(src.ptr(), value)) return true;
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
    if (value.device < 0 && !is_on_cpu(src)) throw std::invalid_argument("a tensor is neither on the CPU nor on a GPU");
    value.dtype = qvl::DTypeTable::instance().find(dtype.ptr());
    for (Py_ssize_t i = 0; i < ndim; ++i) {
      value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
    }
    return true;
  }

 private:
  static bool is_on_cpu(handle tensor) {  // a "meta" tensor's get_device() is -1 too, and it has no data
    const auto answer = reinterpret_steal<object>(PyObject_GetAttrString(tensor.ptr(), "is_cpu"));
    if (!answer) throw error_already_set();
    return answer.ptr() == Py_True;
  }
};

}  // namespace pybind11::detail

// The rows of a (..., C) tensor with any strides in front and stride 1 in the last dimension.
#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace qvl {

// offset(r) is where row r starts, in elements. Dimensions that follow each other in memory are merged first, so that
// the usual tensors cost one multiplication a row.
class Rows {
 public:
  explicit Rows(const TensorView& t) {
    for (int i = 0; i < t.ndim - 1; ++i) {
      if (t.size[i] == 1) continue;
      if (dims_ > 0 && stride_[dims_ - 1] == t.stride[i] * t.size[i]) {
        size_[dims_ - 1] *= t.size[i];
        stride_[dims_ - 1] = t.stride[i];
      } else {
        size_[dims_] = t.size[i];
        stride_[dims_++] = t.stride[i];
      }
    }
  }
  std::int64_t offset(std::int64_t row) const {
    std::int64_t at = 0;
    for (int i = dims_ - 1; i > 0; --i) {
      at += row % size_[i] * stride_[i];
      row /= size_[i];
    }
    return dims_ > 0 ? at + row * stride_[0] : 0;
  }

 private:
  int dims_ = 0;
  std::int64_t size_[kMaxDims];
  std::int64_t stride_[kMaxDims];
};

// Steps through the rows of K tensors of one shape together, in the order of the first one's memory: additions instead
// of Rows' divisions, which cost more than a short row. A view whose data is null stays at 0.
template <int K>
class RowWalk {
 public:
  explicit RowWalk(const TensorView* const (&tensors)[K]) {
    const TensorView& first = *tensors[0];
    for (int i = 0; i < first.ndim - 1; ++i) {
      if (first.size[i] == 1) continue;
      int at = dims_++;
      for (; at > 0 && stride_[0][at - 1] < first.stride[i]; --at) move(at - 1, at);
      size_[at] = first.size[i];
      for (int k = 0; k < K; ++k) stride_[k][at] = tensors[k]->data ? tensors[k]->stride[i] : 0;
    }
    int merged = 0;
    for (int i = 1; i < dims_; ++i) {
      bool one = true;
      for (int k = 0; k < K; ++k) one = one && stride_[k][merged] == stride_[k][i] * size_[i];
      if (one) {
        size_[i] *= size_[merged];
        move(i, merged);
      } else {
        move(i, ++merged);
      }
    }
    if (dims_ > 0) dims_ = merged + 1;
  }
  // Rows that follow each other in all K tensors become one of this many columns, for operations that do not care.
  std::int64_t widen(std::int64_t columns) {
    for (int k = 0; k < K && dims_ > 0; ++k)
      if (stride_[k][dims_ - 1] != columns) return columns;
    return dims_ > 0 ? columns * size_[--dims_] : columns;
  }
  void seek(std::int64_t row) {
    for (int k = 0; k < K; ++k) offset_[k] = 0;
    for (int i = dims_ - 1; i >= 0; --i) {
      index_[i] = row % size_[i];
      row /= size_[i];
      for (int k = 0; k < K; ++k) offset_[k] += index_[i] * stride_[k][i];
    }
  }
  void next() {
    for (int i = dims_ - 1; i >= 0; --i) {
      for (int k = 0; k < K; ++k) offset_[k] += stride_[k][i];
      if (++index_[i] < size_[i]) return;
      index_[i] = 0;
      for (int k = 0; k < K; ++k) offset_[k] -= size_[i] * stride_[k][i];
    }
  }
  // Where the row starts in tensor k, in elements.
  std::int64_t operator[](int k) const { return offset_[k]; }

 private:
  void move(int from, int to) {
    size_[to] = size_[from];
    for (int k = 0; k < K; ++k) stride_[k][to] = stride_[k][from];
  }
  int dims_ = 0;
  std::int64_t size_[kMaxDims], index_[kMaxDims], stride_[K][kMaxDims], offset_[K];
};

}  // namespace qvl

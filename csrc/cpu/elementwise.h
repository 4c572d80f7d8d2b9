// Operations that compute every element by itself: any strides with the last one 1.
#pragma once

#include <algorithm>

#include "../rows.h"
#include "parallel.h"

namespace qvl::cpu {

// Elements that a task touches of each tensor: 16 KiB of float32, so that long rows are shared out too.
constexpr std::int64_t kElementsOfTask = 4096;

// Calls body(walk, n, from) for pieces that cover all elements: n of them, in tensor k from walk[k] + from on.
template <int K, class Body>
void for_elements(const TensorView* const (&tensors)[K], const Body& body) {
  const TensorView& first = *tensors[0];
  const std::int64_t elements = first.numel();
  if (elements == 0) return;
  RowWalk<K> start(tensors);
  const std::int64_t columns = start.widen(first.ndim > 0 ? first.size[first.ndim - 1] : 1);
  const std::int64_t pieces = (columns + kElementsOfTask - 1) / kElementsOfTask;
  parallel_for(elements / columns * pieces, elements, [&](std::int64_t begin, std::int64_t end) {
    RowWalk<K> walk = start;
    walk.seek(begin / pieces);
    std::int64_t from = begin % pieces * kElementsOfTask;
    for (std::int64_t task = begin; task < end; ++task) {
      body(walk, std::min(kElementsOfTask, columns - from), from);
      from += kElementsOfTask;
      if (from >= columns) from = 0, walk.next();
    }
  });
}

}  // namespace qvl::cpu

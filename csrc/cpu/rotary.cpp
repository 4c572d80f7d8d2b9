// Rotary position embedding of queries and keys (rotary.h).

#include "rotary.h"

namespace qvl::cpu {

void rotary(const RotaryParams& p) {
  with_storage_type(p.query.dtype, [&](auto t) { rotate<decltype(t), false>(p); });
}

}  // namespace qvl::cpu

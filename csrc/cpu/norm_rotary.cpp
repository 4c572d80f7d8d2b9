// RMSNorm of every head, then its rotary position embedding (rotary.h).

#include "rotary.h"

namespace qvl::cpu {

void norm_rotary(const RotaryParams& p) {
  with_storage_type(p.query.dtype, [&](auto t) { rotate<decltype(t), true>(p); });
}

}  // namespace qvl::cpu

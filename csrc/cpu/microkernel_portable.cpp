// Vectors of 16 bytes, which every 64-bit processor has: 12 sums, 2 of B, 1 of A.
#include "common/microkernel_body.h"

namespace fused_so {

const Microkernels kPortableMicrokernels = {"portable", make_microkernel<float, 6, 4>(),
                                            make_microkernel<double, 6, 2>()};

}  // namespace fused_so

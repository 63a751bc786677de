// 16 registers of 32 bytes: 12 sums, 2 of B, 1 of A.
#if defined(__x86_64__)
#include <cstdint>
#pragma GCC target("avx2,fma")
#define FUSED_SO_AVX2
#include "common/microkernel_body.h"

namespace fused_so {

const Microkernels kAvx2Microkernels = {"avx2", make_microkernel<float, 6, 8>(),
                                        make_microkernel<double, 6, 4>()};

}  // namespace fused_so
#endif

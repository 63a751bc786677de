// 32 registers of 64 bytes: 28 sums, 2 of B, and A broadcast from memory.
// Per step of depth 28 fused multiply-adds against 16 loads: bound by arithmetic.
#if defined(__x86_64__)
#include <cstdint>
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#define FUSED_SO_AVX512
#include "common/microkernel_body.h"

namespace fused_so {

const Microkernels kAvx512Microkernels = {"avx512", make_microkernel<float, 14, 16>(),
                                          make_microkernel<double, 14, 8>()};

}  // namespace fused_so
#endif

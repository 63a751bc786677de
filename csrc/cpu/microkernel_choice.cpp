// Chooses the micro-kernels once, at run time.
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "common/microkernel.h"

namespace fused_so {
namespace {

const Microkernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
#else
  const bool avx2 = false, avx512 = false;
#endif
  const char* variable = std::getenv("FUSED_SO_CPU");
  const std::string wanted = variable == nullptr ? "" : variable;
  STD_TORCH_CHECK(wanted.empty() || wanted == "avx512" || wanted == "avx2" || wanted == "portable",
                  "the environment variable FUSED_SO_CPU must be avx512, avx2 or portable, got '",
                  wanted, "'");
  STD_TORCH_CHECK((wanted != "avx512" || avx512) && (wanted != "avx2" || avx2),
                  "the environment variable FUSED_SO_CPU asks for ", wanted,
                  ", which this processor does not have");
#if defined(__x86_64__)
  if (wanted == "avx512" || (wanted.empty() && avx512)) return kAvx512Microkernels;
  if (wanted == "avx2" || (wanted.empty() && avx2)) return kAvx2Microkernels;
#endif
  return kPortableMicrokernels;
}

}  // namespace

const Microkernels& microkernels() {
  static const Microkernels& chosen = choose();
  return chosen;
}

}  // namespace fused_so

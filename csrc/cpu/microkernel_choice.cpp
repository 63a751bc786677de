// Chooses the micro-kernels once, at run time.
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "common/microkernel.h"

#if defined(FUSED_SO_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_so {
namespace {

// Whether the processor has matrix tiles of bfloat16, and the system lets this process use them.
bool amx_granted() {
#if defined(FUSED_SO_HAS_AMX)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & kBFloat16) == 0 || (edx & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const Microkernels& choose() {
  const char* variable = std::getenv("FUSED_SO_CPU");
  const std::string wanted = variable == nullptr ? "" : variable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  // Only who may use it asks: from then on signals save the tiles too.
  const bool amx = avx512 && (wanted.empty() || wanted == "amx") && amx_granted();
#else
  const bool avx2 = false, avx512 = false, amx = false;
#endif
  STD_TORCH_CHECK(
      wanted.empty() || wanted == "amx" || wanted == "avx512" || wanted == "avx2" ||
          wanted == "portable",
      "the environment variable FUSED_SO_CPU must be amx, avx512, avx2 or portable, got '", wanted,
      "'");
  STD_TORCH_CHECK(
      (wanted != "amx" || amx) && (wanted != "avx512" || avx512) && (wanted != "avx2" || avx2),
      "the environment variable FUSED_SO_CPU asks for ", wanted,
      ", which this processor or system does not have");
#if defined(FUSED_SO_HAS_AMX)
  constexpr int64_t kLargeFrom = 104;  // measured: 128 x 500 is slower so, 128 x 1000 faster
  static const Microkernels with_amx = {"amx", kAvx512Microkernels.f32, kAvx512Microkernels.f64,
                                        &kAmxTiles, wanted.empty() ? kLargeFrom : 0};
  if (amx) return with_amx;
#endif
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

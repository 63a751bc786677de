// The whole parameter update of many tensors in one parallel region.
// Per element 6 operations; 20 bytes in float32 with momentum (reads p, Delta, v; writes p, v):
// bound by memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/dispatch.h"
#include "common/gemm.h"
#include "common/lists.h"
#include "common/parallel.h"
#include "common/update_rule.h"

namespace fused_so {
namespace {

constexpr int64_t kChunk = 1 << 16;

template <class P, class U>
struct Chunk {
  P* param;
  const U* update;
  Accumulate<P>* buffer;
  int64_t size;
};

template <class P, class U>
void update_chunk(const Chunk<P, U>& chunk, const UpdateRule<Accumulate<P>>& rule,
                  Accumulate<P> scale) {
  using A = Accumulate<P>;
  const auto& kernels = gemm_detail::readers<A, P>();
  auto* const param = gemm_detail::as_bits(chunk.param);
  const auto* const update = gemm_detail::as_bits(chunk.update);
  if constexpr (std::is_same_v<U, P>) {
    kernels.update(chunk.size, rule, scale, param, update, chunk.buffer);
  } else {
    kernels.update_wide(chunk.size, rule, scale, param, update, chunk.buffer);
  }
}

template <class P, class U>
void update_all(const std::vector<Tensor>& params, const std::vector<Tensor>& updates,
                const std::vector<Tensor>& buffers, UpdateRule<Accumulate<P>> rule,
                Accumulate<P> scale) {
  using A = Accumulate<P>;
  std::vector<Chunk<P, U>> chunks;
  int64_t total = 0;
  for (size_t t = 0; t < params.size(); ++t) {
    const int64_t size = params[t].numel();
    total += size;
    for (int64_t begin = 0; begin < size; begin += kChunk) {
      chunks.push_back({write<P>(params[t]) + begin, read<U>(updates[t]) + begin,
                        buffers.empty() ? nullptr : write<A>(buffers[t]) + begin,
                        std::min(kChunk, size - begin)});
    }
  }
  // Waking the threads costs more than two chunks.
  const Threads threads = total < 2 * kChunk ? Threads::kOne : Threads::kAll;
  for_each_task_in_shares(static_cast<int64_t>(chunks.size()), threads,
                          [&](int64_t c) { update_chunk(chunks[c], rule, scale); });
}

void apply_update(std::vector<Tensor> params, std::vector<Tensor> updates,
                  std::vector<Tensor> momentum_buffers, double lr, double momentum,
                  double weight_decay, bool nesterov, std::optional<Tensor> scale) {
  check_entries("apply_update_", "updates", updates, params.size());
  check_entries("apply_update_", "momentum_buffers", momentum_buffers,
                momentum == 0 ? 0 : params.size());
  if (params.empty()) return;
  for (Tensor& update : updates) {
    if (!update.is_contiguous()) update = torch::stable::contiguous(update);
  }
  with_type(params[0].scalar_type(), [&](auto param_tag) {
    using P = typename decltype(param_tag)::type;
    using A = Accumulate<P>;
    const UpdateRule<A> rule{static_cast<A>(lr), static_cast<A>(momentum),
                             static_cast<A>(weight_decay), nesterov};
    const A factor = scale ? *read<A>(*scale) : A(1);
    if (factor == 0) return;
    if (updates[0].scalar_type() == params[0].scalar_type()) {
      update_all<P, P>(params, updates, momentum_buffers, rule, factor);
    } else {
      update_all<P, A>(params, updates, momentum_buffers, rule, factor);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_so, CPU, m) { m.impl("apply_update_", TORCH_BOX(&apply_update)); }

}  // namespace fused_so

// The whole parameter update of many tensors in one parallel region.
// Per element 6 operations; 20 bytes in float32 with momentum (reads p, Delta, v; writes p, v):
// bound by memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/update_rule.h"

namespace fused_so {
namespace {

constexpr int64_t kWorthSharing = 1 << 17;  // waking the threads costs more than fewer entries
constexpr int64_t kUnit = 64;               // entries, no two threads' in one cache line

template <class P, class U>
struct Part {
  P* param;
  const U* update;
  Accumulate<P>* buffer;
  int64_t size;

  Part slice(int64_t begin, int64_t end) const {
    return {param + begin, update + begin, buffer == nullptr ? buffer : buffer + begin,
            end - begin};
  }
};

// kNesterov is rule.nesterov, known at compile time, and the velocity a local variable, surely
// not null: with a branch inside, the loop would not be vectorized (measured: 2 times slower).
template <bool kHasBuffer, bool kNesterov, class P, class U>
void update_part(const Part<P, U>& part, UpdateRule<Accumulate<P>> rule, Accumulate<P> scale) {
  using A = Accumulate<P>;
  rule.nesterov = kNesterov;
  P* __restrict param = part.param;
  const U* __restrict update = part.update;
  A* __restrict buffer = part.buffer;
  for (int64_t i = 0; i < part.size; ++i) {
    const A p = static_cast<A>(param[i]), u = static_cast<A>(update[i]);
    if constexpr (kHasBuffer) {
      A velocity = buffer[i];
      param[i] = static_cast<P>(rule(p, u, scale, &velocity));
      buffer[i] = velocity;
    } else {
      param[i] = static_cast<P>(rule(p, u, scale, nullptr));
    }
  }
}

template <class P, class U>
void update_all(const std::vector<Tensor>& params, const std::vector<Tensor>& updates,
                const std::vector<Tensor>& buffers, UpdateRule<Accumulate<P>> rule,
                Accumulate<P> scale) {
  using A = Accumulate<P>;
  std::vector<Part<P, U>> tensors;
  int64_t total = 0;
  for (size_t t = 0; t < params.size(); ++t) {
    tensors.push_back({write<P>(params[t]), read<U>(updates[t]),
                       buffers.empty() ? nullptr : write<A>(buffers[t]), params[t].numel()});
    total += tensors.back().size;
  }
  // A thread takes the same entries at every step, all neighbours: what its cache still holds need
  // not be fetched from another's (measured: faster than chunks that go to whoever is free).
  const int64_t workers = total < kWorthSharing ? 1 : count_workers(Threads::kAll);
  const auto update_shares = [&](int64_t begin, int64_t end) {
    int64_t offset = 0;
    for (const Part<P, U>& tensor : tensors) {
      const auto edge = [&](int64_t share) {
        const int64_t entries = share == workers ? total : total / workers * share;
        return std::clamp<int64_t>((entries - offset + kUnit - 1) / kUnit * kUnit, 0, tensor.size);
      };
      const Part<P, U> part = tensor.slice(edge(begin), edge(end));
      offset += tensor.size;
      if (buffers.empty()) {
        update_part<false, false>(part, rule, scale);
      } else if (rule.nesterov) {
        update_part<true, true>(part, rule, scale);
      } else {
        update_part<true, false>(part, rule, scale);
      }
    }
  };
  if (workers == 1) {
    update_shares(0, 1);
  } else {
    torch::stable::parallel_for(0, workers, 1, update_shares);
  }
}

void apply_update(std::vector<Tensor> params, std::vector<Tensor> updates,
                  std::vector<Tensor> momentum_buffers, double lr, double momentum,
                  double weight_decay, bool nesterov, std::optional<Tensor> scale) {
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

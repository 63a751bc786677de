// Tasks over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fused_so {

enum class Threads { kOne, kAll };

inline int64_t count_workers(Threads threads) {
  return threads == Threads::kOne ? 1 : torch::stable::get_num_threads();
}

// Calls task(0) .. task(count - 1), each once, in any order: a thread takes the next one when it
// is free, so that a slow core does not hold the others up. Inside a parallel region: serial.
template <class Task>
void for_each_task(int64_t count, Threads threads, const Task& task) {
  const int64_t workers = std::min(count, count_workers(threads));
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(i);
  });
}

}  // namespace fused_so

// Work items over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace hyperinf {

// Runs work(item, worker) for every item; workers are numbered below worker_count(items). Items are
// handed out as workers become free, so an item must not depend on which worker runs it, nor when.
inline int64_t worker_count(int64_t items) {
  return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), items));
}

template <class Work>
void for_each_item(int64_t items, const Work& work) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, worker_count(items), 1, [&](int64_t begin, int64_t) {
    for (int64_t item = next++; item < items; item = next++) work(item, begin);
  });
}

}  // namespace hyperinf

// Lists with an entry for each layer or tensor. The public functions have checked them and name the
// argument; who calls an op through torch.ops is still not to read beyond their ends.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstddef>

namespace fused_so {

// Raises unless the list `name` of `op` is as long as its first one.
template <class List>
void check_entries(const char* op, const char* name, const List& list, size_t expected) {
  STD_TORCH_CHECK(list.size() == expected, op, ": ", name, " must hold ", expected,
                  " entries, got ", list.size());
}

}  // namespace fused_so

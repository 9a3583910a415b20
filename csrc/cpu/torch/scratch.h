// Memory for kernels, kept between calls: pages that the system hands out are cleared first, which for the buffers of a
// backward pass takes as long as a matrix product.
#pragma once

#include <cstddef>
#include <cstdint>

namespace macaron_ops {

void* allocate_scratch(size_t bytes);  // aligned to 64 bytes; from any thread
void release_scratch(void* p);

// The most bytes in use at a time since the last call, which starts anew from what is in use now.
int64_t scratch_peak();

}  // namespace macaron_ops

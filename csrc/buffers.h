// Memory of large results, taken back when a tensor dies and handed out again: a fresh allocation of this size is new
// pages every time, and touching those costs more than computing what goes into them.
#pragma once

#include <ATen/ATen.h>

namespace cxgrad {

// an uninitialised tensor in row-major order
at::Tensor empty_buffer(at::IntArrayRef sizes, const at::TensorOptions& options);

// give the kept memory back to the system; the number of bytes that it was
int64_t release_buffers();

// bytes taken from the system so far: a step like the last one takes none
int64_t fresh_buffer_bytes();

// fill what is handed out from now on with NaN (0xFF bytes): tests find what a kernel forgets to write
void poison_buffers(bool on);

}  // namespace cxgrad

#include "sums.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "buffers.h"

namespace cxgrad {
namespace {

constexpr int64_t kBlock = 4096;          // elements that stay in the first cache from term to term
constexpr int64_t kBlocksPerThread = 16;  // fewer are not worth a second thread

template <class T>
struct Sum {
  T* out;
  int64_t first, count;  // of the terms
  int64_t size;
};

template <class T>
void add(const Sum<T>& sum, const std::vector<const T*>& terms, int64_t begin, int64_t end) {
  const T *a = terms[sum.first], *b = terms[sum.first + 1];
  for (int64_t i = begin; i < end; ++i) sum.out[i] = a[i] + b[i];
  for (int64_t k = 2; k < sum.count; ++k) {
    const T* c = terms[sum.first + k];
    for (int64_t i = begin; i < end; ++i) sum.out[i] += c[i];
  }
}

}  // namespace

std::vector<at::Tensor> sums(at::TensorList terms, at::IntArrayRef counts) {
  std::vector<at::Tensor> outs;
  AT_DISPATCH_FLOATING_TYPES(terms[0].scalar_type(), "sums", [&] {
    std::vector<const scalar_t*> data;
    for (const auto& term : terms) data.push_back(term.const_data_ptr<scalar_t>());
    std::vector<Sum<scalar_t>> all;
    std::vector<std::pair<size_t, int64_t>> blocks;  // which sum, from where
    int64_t first = 0;
    for (const int64_t count : counts) {
      outs.push_back(empty_buffer(terms[first].sizes(), terms[first].options()));
      all.push_back({outs.back().mutable_data_ptr<scalar_t>(), first, count, outs.back().numel()});
      for (int64_t start = 0; start < outs.back().numel(); start += kBlock) blocks.emplace_back(all.size() - 1, start);
      first += count;
    }
    at::parallel_for(0, int64_t(blocks.size()), kBlocksPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto& sum = all[blocks[i].first];
        add(sum, data, blocks[i].second, std::min(blocks[i].second + kBlock, sum.size));
      }
    });
  });
  return outs;
}

}  // namespace cxgrad

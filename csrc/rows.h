// Inner products and linear combinations of rows, in float64; a row is a weight of one task, or what has its shape.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "wide.h"

namespace cxgrad {

// Rows are cut into blocks whose size depends on nothing: the same sums for any number of threads.
inline constexpr int64_t kBlock = 4096;
inline constexpr int64_t kBlocksPerThread = 8;  // fewer are not worth a second thread

template <class T>
struct Product {
  const T *a, *b;
  int64_t count;
};

template <class T>
struct Term {
  double factor;
  const T* row;
};

template <class T>
struct Combination {
  T* out;
  int64_t count;
  std::vector<Term<T>> terms;
};

struct Block {
  int64_t item, start, count;
};

template <class Item>
std::vector<Block> blocks_of_items(const std::vector<Item>& items) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < items.size(); ++i)
    for (int64_t start = 0; start < items[i].count; start += kBlock)
      blocks.push_back({int64_t(i), start, std::min(kBlock, items[i].count - start)});
  return blocks;
}

template <class T>
std::vector<double> compute(const std::vector<Product<T>>& products) {
  const auto blocks = blocks_of_items(products);
  std::vector<double> parts(blocks.size()), results(products.size(), 0.0);
  at::parallel_for(0, int64_t(blocks.size()), kBlocksPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& [item, start, count] = blocks[i];
      parts[i] = inner_product(products[item].a + start, products[item].b + start, count);
    }
  });
  for (size_t i = 0; i < blocks.size(); ++i) results[blocks[i].item] += parts[i];
  return results;
}

// out = sum of the terms' rows, entries start to end; Terms 0: any number of them
template <class T, int Terms>
void combine(const Combination<T>& combination, int64_t start, int64_t end) {
  constexpr int64_t W = kWidth<double>;
  const Term<T>* terms = combination.terms.data();
  const int count = Terms ? Terms : int(combination.terms.size());
  int64_t k = start;
  for (; k + W <= end; k += W) {
    Vec<double> total{};
    for (int i = 0; i < count; ++i) total += terms[i].factor * load_wide(terms[i].row + k);
    store_rounded(combination.out + k, total);
  }
  if (k == end) return;
  Vec<double> total{};
  for (int i = 0; i < count; ++i) total += terms[i].factor * load_wide(terms[i].row + k, end - k);
  store_rounded(combination.out + k, total, end - k);
}

template <class T>
void compute(const std::vector<Combination<T>>& combinations) {
  const auto blocks = blocks_of_items(combinations);
  at::parallel_for(0, int64_t(blocks.size()), kBlocksPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto& [item, start, count] = blocks[i];
      const Combination<T>& combination = combinations[item];
      switch (combination.terms.size()) {
        case 1: combine<T, 1>(combination, start, start + count); break;
        case 2: combine<T, 2>(combination, start, start + count); break;
        case 3: combine<T, 3>(combination, start, start + count); break;
        default: combine<T, 0>(combination, start, start + count);
      }
    }
  });
}

}  // namespace cxgrad

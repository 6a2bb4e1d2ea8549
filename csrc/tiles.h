// Products of bfloat16 matrices on AMX's tile registers: 16 x 32 by 32 x 16 values an instruction, summed in float32.
#pragma once

#include <cstdint>
#include <optional>

namespace cxgrad {

// c (+)= a b, in tiles of 16 rows and 16 columns, over `runs` runs of `steps` steps of 32 products each
struct TileProduct {
  int64_t rows, columns;  // of tiles
  int64_t runs, steps;
  const uint16_t* a;      // a row every a_row values; a step's 32 values lie together, the next step behind them,
  int64_t a_row, a_run;   // the next run a_run values behind the last
  const uint32_t* b;      // a row of b_row pairs for every two products: values 2 k (low half) and 2 k + 1 of a column
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool accumulate;
};

// whether this process may use them: the CPU has AMX for bfloat16, and the system grants its state
bool has_tiles();

// for tests, which stand in for the instructions: believe that there are tiles or none, or the processor again
void assume_tiles(std::optional<bool> there);

void multiply_tiles(const TileProduct& product);

}  // namespace cxgrad

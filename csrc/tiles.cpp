#include "tiles.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define CXGRAD_WITH_TILES 1
#else
#define CXGRAD_WITH_TILES 0
#endif

namespace cxgrad {
namespace {

#if CXGRAD_WITH_TILES

#define CXGRAD_AMX __attribute__((target("amx-tile,amx-bf16")))

bool granted() {
  constexpr unsigned kTile = 1u << 24, kBfloat16 = 1u << 22;  // CPUID leaf 7, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, for all threads
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTile) == 0 || (edx & kBfloat16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// every register the same: 16 rows of 64 bytes
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const TileConfiguration kConfiguration;

// Registers 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 columns of b: four loads serve four products.
template <int Rows, int Columns>
CXGRAD_AMX void multiply_block(const TileProduct& p, int64_t row, int64_t column) {
  const int64_t a_bytes = 2 * p.a_row, b_bytes = 4 * p.b_row, c_bytes = 4 * p.c_row;
  float* above = p.c + 16 * row * p.c_row + 16 * column;
  float* below = above + 16 * p.c_row;
  if (p.accumulate) {
    _tile_loadd(0, above, c_bytes);
    if constexpr (Columns == 2) _tile_loadd(1, above + 16, c_bytes);
    if constexpr (Rows == 2) _tile_loadd(2, below, c_bytes);
    if constexpr (Rows == 2 && Columns == 2) _tile_loadd(3, below + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint32_t* b = p.b + 16 * column;
  for (int64_t run = 0; run < p.runs; ++run) {
    const uint16_t* a = p.a + 16 * row * p.a_row + run * p.a_run;
    for (int64_t step = 0; step < p.steps; ++step, a += 32, b += 16 * p.b_row) {
      _tile_loadd(4, a, a_bytes);
      _tile_loadd(6, b, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (Columns == 2) {
        _tile_loadd(7, b + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (Rows == 2) {
        _tile_loadd(5, a + 16 * p.a_row, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (Columns == 2) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, above, c_bytes);
  if constexpr (Columns == 2) _tile_stored(1, above + 16, c_bytes);
  if constexpr (Rows == 2) _tile_stored(2, below, c_bytes);
  if constexpr (Rows == 2 && Columns == 2) _tile_stored(3, below + 16, c_bytes);
}

template <int Columns>
void multiply_columns(const TileProduct& product, int64_t column) {
  int64_t row = 0;
  for (; row + 2 <= product.rows; row += 2) multiply_block<2, Columns>(product, row, column);
  if (row < product.rows) multiply_block<1, Columns>(product, row, column);
}

CXGRAD_AMX void multiply(const TileProduct& product) {
  // the intrinsics do not tell the compiler which memory they read
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&kConfiguration);
  int64_t column = 0;  // two columns' b stays in the first-level cache while a passes by
  for (; column + 2 <= product.columns; column += 2) multiply_columns<2>(product, column);
  if (column < product.columns) multiply_columns<1>(product, column);
  _tile_release();
  __asm__ volatile("" ::: "memory");
}

#else

bool granted() { return false; }
void multiply(const TileProduct&) { throw std::logic_error("built without tile registers"); }

#endif

std::atomic<int> assumed{-1};  // 0 or 1 once a test has said so

}  // namespace

bool has_tiles() {
  static const bool has = granted();
  const int said = assumed.load(std::memory_order_relaxed);
  return said < 0 ? has : said > 0 && CXGRAD_WITH_TILES;
}

void assume_tiles(std::optional<bool> there) { assumed = there ? int(*there) : -1; }

void multiply_tiles(const TileProduct& product) { multiply(product); }

}  // namespace cxgrad

// AMX where there is none: a handler of SIGILL that does what the tile instructions of csrc/tiles.cpp would have done,
// by Intel's Software Developer's Manual (volume 2, the operation of each), on the machine code that runs elsewhere.
//
// Any other undefined instruction, or one that the processor would have refused, ends the process with a message.
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>

#include <atomic>

namespace {

struct Tile {
  uint8_t row[16][64];
};

struct Tiles {
  bool configured = false;
  uint16_t bytes[8];
  uint8_t rows[8];
  Tile tile[8];
};

thread_local Tiles tiles;
std::atomic<int64_t> products{0};

[[noreturn]] void refuse(const char* what, const uint8_t* code) {
  std::fprintf(stderr, "amx_emulator: %s at %02x %02x %02x %02x %02x\n", what, code[0], code[1], code[2], code[3],
               code[4]);
  std::_Exit(70);
}

float flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float factor(const Tile& tile, int row, int at) {
  uint16_t digits;
  std::memcpy(&digits, tile.row[row] + 2 * at, sizeof digits);
  return flushed(from_bits(uint32_t(digits) << 16));
}

void multiply(Tile& c, const Tile& a, const Tile& b, int rows, int a_bytes, int columns) {
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < a_bytes / 4; ++k) {
        even = flushed(std::fma(factor(a, m, 2 * k), factor(b, k, 2 * n), even));
        odd = flushed(std::fma(factor(a, m, 2 * k + 1), factor(b, k, 2 * n + 1), odd));
      }
      std::memcpy(&sum, c.row[m] + 4 * n, sizeof sum);
      sum = flushed(flushed(sum) + flushed(even + odd));
      std::memcpy(c.row[m] + 4 * n, &sum, sizeof sum);
    }
  ++products;
}

void configure(const uint8_t* memory, const uint8_t* code) {
  tiles.configured = memory[0] == 1;
  if (memory[0] > 1 || memory[1] != 0) refuse("a palette other than 0 and 1, or a start row", code);
  std::memset(tiles.tile, 0, sizeof tiles.tile);
  for (int i = 0; i < 8; ++i) {
    std::memcpy(&tiles.bytes[i], memory + 16 + 2 * i, 2);
    tiles.rows[i] = memory[48 + i];
    if (tiles.bytes[i] > 64 || tiles.rows[i] > 16) refuse("tiles that are too large", code);
  }
}

// the registers of a context in the order of their numbers in machine code
uint64_t general(const ucontext_t* context, int number) {
  static const int place[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return uint64_t(context->uc_mcontext.gregs[place[number]]);
}

// what a ModRM byte at `at` addresses, the stride of a SIB byte's index apart
struct Address {
  uint8_t* base;
  int64_t stride;
  const uint8_t* end;
};

Address address_of(const ucontext_t* context, const uint8_t* at, int vex) {
  const int mode = *at >> 6, low = *at & 7, base_high = vex & 0x20 ? 0 : 8, index_high = vex & 0x40 ? 0 : 8;
  const uint8_t* next = at + 1;
  uint64_t base = 0;
  int64_t stride = 0;
  bool wide = mode == 2;
  if (low == 4) {
    const int sib = *next++, index = (sib >> 3 & 7) + index_high;
    if (index != 4) stride = int64_t(general(context, index)) << (sib >> 6);
    if ((sib & 7) == 5 && mode == 0)
      wide = true;
    else
      base = general(context, (sib & 7) + base_high);
  } else if (low == 5 && mode == 0) {
    int32_t distance;
    std::memcpy(&distance, next, 4);
    return {const_cast<uint8_t*>(next) + 4 + distance, 0, next + 4};
  } else {
    base = general(context, low + base_high);
  }
  if (mode == 1) base += uint64_t(int64_t(int8_t(*next++)));
  if (wide) {
    int32_t distance;
    std::memcpy(&distance, next, 4);
    base += uint64_t(int64_t(distance));
    next += 4;
  }
  return {reinterpret_cast<uint8_t*>(base), stride, next};
}

void handle(int, siginfo_t*, void* raw) {
  auto* context = static_cast<ucontext_t*>(raw);
  const auto* code = reinterpret_cast<const uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  enum { kNone, kSixtySix, kF3, kF2 };
  if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0) refuse("no tile instruction", code);
  const int prefix = code[2] & 3, operation = code[3], modrm = code[4], second = (~code[2] >> 3) & 15;
  const bool memory = modrm >> 6 != 3;
  const int reg = (modrm >> 3 & 7) + (code[1] & 0x80 ? 0 : 8);
  const uint8_t* end = code + 5;
  if (operation == 0x49 && prefix == kNone && memory && reg == 0) {
    const Address address = address_of(context, code + 4, code[1]);
    configure(address.base, code);
    end = address.end;
  } else if (operation == 0x49 && prefix == kNone && modrm == 0xC0) {
    tiles.configured = false;
  } else {
    if (!tiles.configured) refuse("tiles are not configured", code);
    if (reg > 7) refuse("there are eight tiles", code);
    Tile& tile = tiles.tile[reg];
    if (operation == 0x49 && prefix == kF2 && !memory) {
      std::memset(&tile, 0, sizeof tile);
    } else if (operation == 0x4B && memory && (modrm & 7) == 4 && (prefix == kF2 || prefix == kF3)) {
      const Address address = address_of(context, code + 4, code[1]);
      if (prefix == kF2) std::memset(&tile, 0, sizeof tile);
      for (int row = 0; row < tiles.rows[reg]; ++row) {
        uint8_t* at = address.base + row * address.stride;
        if (prefix == kF2)
          std::memcpy(tile.row[row], at, tiles.bytes[reg]);
        else
          std::memcpy(at, tile.row[row], tiles.bytes[reg]);
      }
      end = address.end;
    } else if (operation == 0x5C && prefix == kF3 && !memory) {
      const int a = modrm & 7, b = second;
      if (b > 7 || a == b || a == reg || b == reg) refuse("three different tiles are needed", code);
      if (tiles.rows[reg] != tiles.rows[a] || tiles.bytes[reg] != tiles.bytes[b] || tiles.bytes[a] != 4 * tiles.rows[b])
        refuse("tiles do not fit together", code);
      multiply(tile, tiles.tile[a], tiles.tile[b], tiles.rows[reg], tiles.bytes[a], tiles.bytes[reg] / 4);
    } else {
      refuse("no tile instruction", code);
    }
  }
  context->uc_mcontext.gregs[REG_RIP] = greg_t(reinterpret_cast<uintptr_t>(end));
}

}  // namespace

extern "C" void install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

// TDPBF16PS done since the last call
extern "C" int64_t take_products() { return products.exchange(0); }

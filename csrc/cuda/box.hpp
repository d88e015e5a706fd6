// Where things lie that Hopper's copies and products exchange: plain arithmetic, the same on the host.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HVPFAST_BOTH __host__ __device__
#else
#define HVPFAST_BOTH
#endif

namespace hvpfast {

constexpr int kBoxWidth = 64, kBoxRows = 64;          // of 16-bit elements
constexpr int kBoxBytes = kBoxWidth * kBoxRows * 2;
constexpr int kProductRows = 16;                      // that one product sums over
constexpr int kBytesPerProduct = kProductRows * 128;  // how far its rows reach into a box

// The descriptor of an operand that lies in boxes from `address` on: address, leading and stride byte offset in units of 16
// bytes from bits 0, 16 and 32, the 128-byte swizzle in bits 62 and 63. (Triton 3.9 gives its products of tiles of this shape and
// layout the same bits, and the same steps of 2048 bytes from one to the next; read off its PTX.)
HVPFAST_BOTH constexpr uint64_t descriptor(uint32_t address) {
    return static_cast<uint64_t>(address >> 4 & 0x3FFF) | static_cast<uint64_t>(kBoxBytes >> 4) << 16 |
           static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

static_assert(descriptor(0x400) == 0x4000004002000040, "8192 and 1024 bytes apart, 128-byte swizzle");

// The element of a product's (64, 128) result that thread t of the warpgroup has in register e.
HVPFAST_BOTH constexpr int product_row(int t, int e) { return t / 32 * 16 + t % 32 / 4 + e / 2 % 2 * 8; }
HVPFAST_BOTH constexpr int product_column(int t, int e) { return e / 4 * 8 + t % 4 * 2 + e % 2; }

}  // namespace hvpfast

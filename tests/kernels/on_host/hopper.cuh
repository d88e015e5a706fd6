// Hopper's instructions on the host, in the place of csrc/cuda/hopper.cuh: shared memory is an array with addresses of its own,
// copies swap pieces as the CUDA documentation says, products read descriptors as the PTX ISA's canonical layouts say, and are
// put off until they are waited for, so that memory given back too early shows.
#pragma once
#define __CUDA_ARCH_FEAT_SM90_ALL

#include <cstring>
#include <deque>
#include <map>

#include "box.hpp"
#include "check.cuh"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "dtype.hpp"

namespace hvpfast {

struct TensorMap {
    const uint16_t* x;
    int64_t rows, width, stride;
};

inline TensorMap tensor_map(const void* x, Dtype dtype, int64_t rows, int64_t width, int64_t stride) {
    const bool fits = reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride % 8 == 0 && stride > 0 && rows > 0 && width > 0;
    if (!fits || dtype == Dtype::float32) throw std::runtime_error("tensor_map: the copies do not take this");
    return {static_cast<const uint16_t*>(x), rows, width, stride};
}

constexpr uint32_t kBase = 1024;  // of the shared memory; addresses below are nobody's
alignas(16) inline unsigned char memory[228 * 1024];

inline uint32_t shared_memory() {
    if (threadIdx.x == 0) std::memset(memory, 0xff, sizeof memory);  // NaN
    return kBase;
}

struct Counted {
    uint32_t arrivals, missing;
    int64_t bytes;
    uint32_t phase;
};
inline std::map<uint32_t, Counted> barriers;

inline void barrier_make(uint32_t barrier, uint32_t arrivals) {
    barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void barriers_made() {}

inline void barrier_change(uint32_t barrier, uint32_t arrived, int64_t bytes) {
    Counted& b = barriers.at(barrier);
    b.missing -= arrived, b.bytes += bytes;
    if (b.missing == 0 && b.bytes == 0) b.missing = b.arrivals, ++b.phase;
}
inline void barrier_arrive(uint32_t barrier) { barrier_change(barrier, 1, 0); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    barrier_change(barrier, 0, bytes), barrier_change(barrier, 1, 0);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    const auto passed = [=] { return (barriers.at(barrier).phase & 1) != parity; };
    if (!passed()) wait_until(passed);
}

inline void map_ahead(const TensorMap*) {}
inline void copy_box(const TensorMap* map, int32_t row, int32_t column, uint32_t to, uint32_t barrier) {
    if (to % 1024 != 0) throw std::runtime_error("copy_box: the box is not on 1024 bytes");
    for (int r = 0; r < kBoxRows; ++r) {
        for (int c = 0; c < kBoxWidth; ++c) {
            const bool inside = row + r < map->rows && column + c < map->width;
            const uint16_t value = inside ? map->x[(row + r) * map->stride + column + c] : 0;
            const int piece = c / 8 ^ r % 8;
            std::memcpy(memory + to - kBase + r * 128 + piece * 16 + c % 8 * 2, &value, 2);
        }
    }
    barrier_change(barrier, 0, -kBoxBytes);
}

// Element (mn, k) of an operand along whose long side 64 elements make a swizzled row.
template <Dtype DTYPE>
float operand(uint64_t descriptor, int mn, int k) {
    const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
    const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
    if (descriptor >> 62 != 1 || (descriptor >> 46 & 0xFFFF) != 0) throw std::runtime_error("a descriptor of another layout");
    const uint32_t plain = start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2;
    const uint32_t address = plain ^ ((plain >> 7 & 7) << 4);
    if constexpr (DTYPE == Dtype::bfloat16) {
        __nv_bfloat16 value;
        std::memcpy(&value, memory + address - kBase, 2);
        return __bfloat162float(value);
    } else {
        __half value;
        std::memcpy(&value, memory + address - kBase, 2);
        return __half2float(value);
    }
}

struct Put {
    float* d;
    uint64_t a, b;
    int accumulate;
    void (*run)(const Put&);
};
struct Products {
    std::deque<std::deque<Put>> under_way;
    bool fenced = false;
};
inline Products& products() {  // this thread's
    if (!current->own) current->own = std::make_shared<Products>();
    return *static_cast<Products*>(current->own.get());
}

template <Dtype DTYPE>
void run_product(const Put& put) {
    const int t = threadIdx.x % 128, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
    for (int k = 0; k < 16; ++k) {
        const float a[2] = {operand<DTYPE>(put.a, row, k), operand<DTYPE>(put.a, row + 8, k)};
        for (int n = 0; n < 128; n += 8) {
            const float b[2] = {operand<DTYPE>(put.b, n + column, k), operand<DTYPE>(put.b, n + column + 1, k)};
            for (int e = 0; e < 4; ++e) {  // registers n / 2 + e: this row twice, then the eighth after it
                float& d = put.d[n / 2 + e];
                d = (k == 0 && !put.accumulate ? 0.0f : d) + a[e / 2] * b[e % 2];
            }
        }
    }
}

inline void together() { wait(current->warp->barrier); }  // what `.sync.aligned` asks of the lanes of a warp

inline void products_begin() { together(), products().fenced = true, products().under_way.emplace_back(); }
template <Dtype DTYPE>
void product(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    if (!products().fenced) throw std::runtime_error("a product without a fence before it");
    products().under_way.back().push_back({d, a, b, accumulate, run_product<DTYPE>});
}
inline void products_end() { products().fenced = false; }
template <int COUNT>
void products_wait() {
    together();
    auto& under_way = products().under_way;
    while (static_cast<int>(under_way.size()) > COUNT) {
        for (const Put& put : under_way.front()) put.run(put);
        under_way.pop_front();
    }
    together();
}

inline void products_done(float (&)[64]) {
    if (!products().under_way.empty()) throw std::runtime_error("a sum is used while products into it are under way");
}

}  // namespace hvpfast

// Tensor-core fragments on the host: every thread of a warp holds and does the whole of them.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda::wmma {
struct accumulator {};
struct matrix_a {};
struct matrix_b {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };

inline float widen(__half x) { return __half2float(x); }
inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
    static constexpr int num_elements = 256;
    float x[256];  // row-major
};

template <typename F>
void fill_fragment(F& f, float value) {
    for (float& one : f.x) one = value;
}

template <typename T>
void load_matrix_sync(fragment<matrix_a, 16, 16, 16, T, col_major>& f, const T* from, int pitch) {
    for (int i = 0; i < 256; ++i) f.x[i] = widen(from[i % 16 * pitch + i / 16]);
}

template <typename T>
void load_matrix_sync(fragment<matrix_b, 16, 16, 16, T, row_major>& f, const T* from, int pitch) {
    for (int i = 0; i < 256; ++i) f.x[i] = widen(from[i / 16 * pitch + i % 16]);
}

template <typename D, typename A, typename B>
void mma_sync(D& d, const A& a, const B& b, const D& c) {
    D sum = c;
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n) sum.x[m * 16 + n] += a.x[m * 16 + k] * b.x[k * 16 + n];
    d = sum;
}

template <typename F>
void store_matrix_sync(float* to, const F& f, int pitch, layout_t) {
    for (int i = 0; i < 256; ++i) to[i / 16 * pitch + i % 16] = f.x[i];
}
}  // namespace nvcuda::wmma

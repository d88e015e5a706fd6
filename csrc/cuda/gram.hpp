// gram on CUDA: what bindings.cpp hands over. Raw pointers, extents and strides in elements; nothing is allocated and
// nothing waits: both launches go to `stream`.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace hvpfast {

struct GramArguments {
    const void* x;  // (rows, width), any strides
    Dtype dtype;
    int64_t rows, width, stride_n, stride_d;
    float* out;  // (width, width), or (width + 1, width + 1) with the ones column; out = beta out + alpha x'x
    int64_t out_stride_i, out_stride_j;
    float alpha, beta;  // out is not read if beta is 0
    bool ones_column;
    bool mirror;  // else what is above the diagonal is neither read nor written
    float* workspace;  // gram_workspace(...) floats
    int products;      // 0: the kernels of every GPU. On Hopper, of x as it is or rounded (1), of float32 in halves (3)
    void* halves;      // gram_halves(...) bf16 numbers, on 16 bytes, where float32 x goes with products > 0
    int splits;        // ranges of rows that are summed apart, and then in order: the same bits every time
    int device;        // ordinal
    uintptr_t stream;
};

// Side of the square tiles that the lower triangle of the result is cut into.
int gram_tile();

// Floats of workspace that `gram` needs.
int64_t gram_workspace(int64_t width, bool ones_column, int splits);

// bf16 numbers that float32 x (rows, width) takes in halves (products 3), or rounded (1).
int64_t gram_halves(int64_t rows, int64_t width, int products);

// The tiles of the triangle by warpgroups' products, into the workspace: for gram, with products > 0. x must not be empty;
// 16-bit x on 16 bytes, with unit stride_d and stride_n divisible by 8. per_split: rows of a split, divisible by 64.
void gram_tiles_sm90(const GramArguments& arguments, int blocks, int64_t per_split);

// Throws std::runtime_error with the place and CUDA's own words if a call fails.
void gram(const GramArguments& arguments);

}  // namespace hvpfast

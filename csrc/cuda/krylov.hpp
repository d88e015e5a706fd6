// reorthogonalize on CUDA: what bindings.cpp hands over. Raw pointers, extents and strides in elements; nothing is
// allocated and nothing waits: all launches go to `stream`, and their number depends on pieces, count and normalize alone.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace hvpfast {

struct ReorthogonalizeArguments {
    // (pieces, 7), on the host: of each tensor of the vector the addresses of w (length,), its stride, V (count, length), its two
    // strides, the rest (length,), float64 for float64, else float32, and the length.
    const int64_t* places;
    int pieces;
    Dtype dtype;    // of w and V
    int64_t count;  // of V's orthonormal rows
    double* coefficients;  // (count,)
    double* norm;          // of the rest, before it is divided
    bool normalize;
    double* workspace;  // reorthogonalize_workspace(...) doubles
    int blocks;         // of a launch; what each sums is added in their order: the same bits every time
    int device;         // ordinal
    uintptr_t stream;
};

// Elements of a vector that a block takes at a time: no use in more blocks than there are such chunks.
int krylov_chunk();

// Doubles of workspace that `reorthogonalize` needs.
int64_t reorthogonalize_workspace(int pieces, int64_t count, int blocks);

// Throws std::runtime_error with the place and CUDA's own words if a call fails.
void reorthogonalize(const ReorthogonalizeArguments& arguments);

}  // namespace hvpfast

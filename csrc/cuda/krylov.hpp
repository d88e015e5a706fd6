// reorthogonalize on CUDA: what bindings.cpp hands over. Raw pointers, extents and strides in elements; nothing is
// allocated and nothing waits: all launches go to `stream`, and their number depends on count and normalize alone.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace hvpfast {

struct ReorthogonalizeArguments {
    const void* w;  // (length,)
    Dtype dtype;    // of w and basis
    int64_t length, stride_w;
    const void* basis;  // (count, length), orthonormal rows
    int64_t count, stride_k, stride_n;
    void* rest;            // (length,) float64 for float64, else float32
    double* coefficients;  // (count,)
    double* norm;          // of the rest, before it is divided
    bool normalize;
    double* workspace;  // reorthogonalize_workspace(...) doubles
    int blocks;         // ranges that are summed apart, and then in order: the same bits every time
    int device;         // ordinal
    uintptr_t stream;
};

// Elements of a vector that a block takes at a time: no use in more blocks than there are such chunks.
int krylov_chunk();

// Doubles of workspace that `reorthogonalize` needs.
int64_t reorthogonalize_workspace(int64_t count, int blocks);

// Throws std::runtime_error with the place and CUDA's own words if a call fails.
void reorthogonalize(const ReorthogonalizeArguments& arguments);

}  // namespace hvpfast

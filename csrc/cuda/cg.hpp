// One iteration of conjugate gradients on CUDA: what bindings.cpp hands over. Raw pointers and extents; nothing is allocated
// and nothing waits: all launches go to `stream`, three for every 48 tensors.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace hvpfast {

struct CgArguments {
    const int64_t* places;  // (tensors, 8), on the host: addresses of x, r, p, q, new x, new r, new p, and the elements of each
    int tensors;
    Dtype dtype;  // of x, r, p and q; what is written is float64 for float64, else float32
    int columns;  // systems: element e of a tensor belongs to column e % columns; at most cg_columns()
    const double* rz;  // (columns,) r'r, before
    double damping;
    double* curvature;  // (columns,) p'(q + damping p)
    double* rr;         // (columns,) r'r, after
    double* workspace;  // cg_workspace(...) doubles
    int blocks;         // of a launch
    int device;         // ordinal
    uintptr_t stream;
};

// The most columns that a block can keep apart.
int cg_columns();

// Doubles of workspace that `cg_update` needs.
int64_t cg_workspace(int tensors, int columns, int blocks);

// Throws std::runtime_error with the place and CUDA's own words if a call fails.
void cg_update(const CgArguments& arguments);

}  // namespace hvpfast

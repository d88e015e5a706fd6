// Sums along rows of one tier, for statistics that memory bounds.
#pragma once

#include "common.hpp"

namespace hvpfast {

template <class T>
struct Summing {
    int64_t width;  // values a vector
    // scale += g o (x - mean) rstd and shift += g.
    void (*accumulate)(const T* x, const T* g, T mean, T rstd, int64_t count, T* scale, T* shift);
    // The sums of g and of g o (x - mean), and that of the squares of x - mean where g is null; without x, of g alone.
    void (*dots)(const T* x, const T* g, T mean, int64_t count, double* sum, double* dot);
};

Summing<float> summing_portable_f32();
Summing<double> summing_portable_f64();
#if HVPFAST_X86
Summing<float> summing_avx2_f32();
Summing<double> summing_avx2_f64();
Summing<float> summing_avx512_f32();
Summing<double> summing_avx512_f64();
#endif

}  // namespace hvpfast

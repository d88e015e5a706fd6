// Double backward of activations and norm layers, of one tier: one pass over a row.
#pragma once

#include "common.hpp"

namespace hvpfast {

enum class Activation : int { gelu = 0, gelu_tanh = 1, silu = 2, mish = 3, softplus = 4 };

// One row of a norm layer: all of `count` values, c, c_weight and c_bias zeros and weight ones where there is none.
template <class T>
struct NormRow {
    const T *x, *g, *c, *weight, *c_weight, *c_bias;
    T mean, rstd;
    int64_t count;
    bool centred;  // LayerNorm: the mean is the row's own
};

template <class T>
struct Rop {
    int64_t width;  // values a vector
    // of_g = phi'(x) c, of_x = phi''(x) g c, either of them null. In float alone; double: null.
    void (*activate)(Activation kind, const T* x, const T* g, const T* c, int64_t count, T* of_g, T* of_x);
    // of_g and of_x written, of_w added to, each of them null where not wanted.
    void (*norm)(const NormRow<T>& row, T* of_g, T* of_x, T* of_w);
};

Rop<float> rop_portable_f32();
Rop<double> rop_portable_f64();
#if HVPFAST_X86
Rop<float> rop_avx2_f32();
Rop<double> rop_avx2_f64();
Rop<float> rop_avx512_f32();
Rop<double> rop_avx512_f64();
#endif

}  // namespace hvpfast

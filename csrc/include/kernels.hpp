// The kernels, as the bindings call them: arguments are valid (native.py has checked them).
#pragma once

#include "common.hpp"

namespace hvpfast {

// out = beta out + alpha x'x, (x 1)'(x 1) with `ones`; out is not read if beta is 0, nor above the diagonal with out.lower.
void gram(const Rows& x, bool ones, double alpha, double beta, const Out& out, Precision precision, int threads);

// Whether x and out (of the dtype that x is summed in) share no memory.
bool apart(const Rows& x, const Out& out);

// Why torch's product is as fast for x (rows, features), or null. `turned`: rows, and not features, lie side by side.
// `lower`: that triangle alone is written, for which torch has no product.
const char* gram_slower(int64_t rows, int64_t features, bool turned, bool lower, Dtype dtype, Precision precision);

// A batch of matrices (batch, T, features), in elements of `dtype`.
struct Batch {
    const void* data;
    Dtype dtype;
    int64_t batch, positions, features;
    int64_t batch_stride, position_stride, feature_stride;
};

// out[m] = || g_m' a_{m % N} ||_F^2 for a (N, T, I), g (M, T, O); out: M contiguous float or double.
void sample_norms_squared(const Batch& a, const Batch& g, void* out, Precision precision, int threads);

// out (O, I) = sum_m (g_m' a_{m % N}) o (g_m' a_{m % N}) for a (N, T, I), g (M, T, O).
void second_moment(const Batch& a, const Batch& g, const Out& out, Precision precision, int threads);

// A writable batch of matrices (M, O, I) of float or double.
struct Samples {
    void* data;
    int64_t sample_stride, row_stride, col_stride;
};

// A result of more bytes than this is written past the caches: it would not fit them.
constexpr int64_t kStreamed = int64_t(8) << 20;

// out[m] = g_m' a_{m % N} for a (N, T, I), g (M, T, O).
void sample_grads(const Batch& a, const Batch& g, const Samples& out, Precision precision, int threads);

// Contiguous logits (rows, classes) and v (columns, rows, classes); weight (rows), or null, `weight_stride` apart.
struct SoftmaxRows {
    const void *logits, *v, *weight;
    Dtype dtype;
    int64_t rows, columns, classes, weight_stride;
};

// out = weight (diag(p) - p p') v for each row of logits, shaped like v, contiguous.
void softmax_hvp(const SoftmaxRows& x, void* out, int threads);

// of_g = phi'(x) c and of_x = phi''(x) g c for `count` contiguous values, float32 of any but float64 ones; either may be null.
// `kind`: see Activation.
void activation_rop(int kind, const void* x, const void* g, const void* c, Dtype dtype, int64_t count, float* of_g, float* of_x, int threads);

// Contiguous x, g, c (rows, features), vectors of the features, mean and rstd of the rows, of the type summed in; null: none.
struct NormRows {
    const void *x, *g, *c, *weight, *c_weight, *c_bias, *mean, *rstd;
    Dtype dtype;
    int64_t rows, features;
};

// norm_rop: of_g and of_x (rows, features), of_w (features), each null where it is not wanted.
void norm_rop(const NormRows& x, void* of_g, void* of_x, void* of_w, int threads);

// How a norm layer's input (N, T, I) is normalised: `kind` 1: by the mean and variance of each position, 2: by its mean square,
// 0: (x - mean) rstd, of the type summed in, or null; with `by_feature` one for each sample and feature, else each position.
struct Normalised {
    int kind;
    double eps;
    const void *mean, *rstd;
    int64_t mean_batch, mean_each, rstd_batch, rstd_each;  // strides
    bool by_feature;
};

// norms (2, M) and squares (2, I), contiguous: of sum_t g_mt o x^_nt and of sum_t g_mt, n = m % N.
void norm_sample_stats(const Batch& x, const Batch& g, const Normalised& how, void* norms, void* squares, int threads);

// A convolution's input (batch, groups * channels, three spatial axes; unused axes have size and kernel 1) and geometry.
struct Convolution {
    const void* data;
    Dtype dtype;
    int64_t batch, groups, channels, batch_stride, channel_stride;
    int64_t size[3], space_stride[3], kernel[3], stride[3], dilation[3], before[3], positions[3];
    int64_t offsets() const { return kernel[0] * kernel[1] * kernel[2]; }
    int64_t pixels() const { return size[0] * size[1] * size[2]; }
};

// A square matrix of float or double for each group.
struct GroupsOut {
    void* data;
    int64_t group_stride, row_stride, col_stride;
};

enum class ConvForm : int { automatic = 0, panels = 1, lanes = 2, patches = 3 };

// out = beta out + alpha P'P, group by group, for the patches P (batch * positions, channels * offsets) of x, which are
// never formed. `form`: one way of computing it where that can be done (tests), else the one that should be fastest.
void conv_gram(const Convolution& x, double alpha, double beta, const GroupsOut& out, Precision precision, int threads, ConvForm form);

// out = x w + bias (out.cols, or null) in bf16x3: `x` and `w` as rows of the axis that is summed over, with out's rows and columns as
// features; out's columns lie side by side. False: see `convolve`.
bool matmul(const Rows& x, const Rows& w, const float* bias, const Out& out, int threads);

// A convolution with bias (or null): x (batch, channels, size), whose columns lie side by side, w (features, channels, kernel), out
// (batch, features, places), contiguous; or its `transposed`: w (channels, features, kernel), `stride` and `padding` those of the
// convolution whose input's gradient it is; with a stride above 1, dilation is 1.
struct Convolved {
    const float *x, *w, *bias;
    float* out;
    bool transposed;
    int64_t batch, channels, features, size[2], kernel[2], stride[2], padding[2], dilation[2], places[2];
    int64_t x_stride[3], w_stride[4];
};

// In bf16x3. False: it is not, since there is no AMX or values lie outside bf16's range, and `out` must be computed otherwise.
bool convolve(const Convolved& x, int threads);

}  // namespace hvpfast

// Row kernels of one tier: work that memory or the exponential bounds, where the tile engine has nothing to add.
#pragma once

#include "common.hpp"

namespace hvpfast {

template <class T>
struct Rowwise {
    int64_t width;  // values a vector; scratch rows are padded to a multiple of it
    int64_t side;   // rows of a square of `row_products`
    // `count` values of any dtype, `stride` apart, as T.
    void (*widen)(const void* from, Dtype dtype, int64_t stride, int64_t count, T* to);
    // to[r] = column[r] * row for `rows` rows, `pitch` apart. `stream`: past the caches.
    void (*outer)(const T* column, int64_t rows, const T* row, int64_t cols, T* to, int64_t pitch, bool stream);
    void (*copy)(const T* from, int64_t from_pitch, int64_t rows, int64_t cols, T* to, int64_t pitch, bool stream);
    void (*flush)();  // after a thread's last streamed write
    // x (padded) becomes exp(x - max x), zero in the padding; returns the sum.
    double (*exponentials)(T* x, int64_t count);
    // to = weight p o (v - p'v) for p = e / sum, e padded; `to` may be v.
    void (*project)(const T* e, double sum, const T* v, int64_t count, T weight, T* to);
    double (*squares)(const T* x, int64_t count);  // their sum, over a few values
    // Inner products of `rows` rows with each other, by squares on and above the diagonal, side * side weights each.
    // `weigh`: they become the weights (those off the diagonal twice). Else: the sum of products with the weights.
    // `next`: as many values that are fetched meanwhile, or null.
    double (*row_products)(const T* x, int64_t pitch, int64_t rows, int64_t cols, bool weigh, T* weights, const T* next);
};

const Rowwise<float>& rowwise_f32(Tier tier);
const Rowwise<double>& rowwise_f64(Tier tier);

}  // namespace hvpfast

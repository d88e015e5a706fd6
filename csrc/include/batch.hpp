// Views of one sample of a batch, and what a product of panels costs.
#pragma once

#include "engine.hpp"
#include "kernels.hpp"

namespace hvpfast {

inline const void* at_element(const void* data, Dtype dtype, int64_t offset) {
    const int64_t size = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
    return static_cast<const char*>(data) + offset * size;
}

// Sample n with its positions as rows: (T, features).
inline Rows by_position(const Batch& x, int64_t n) {
    return {at_element(x.data, x.dtype, n * x.batch_stride), x.dtype, 1, x.positions, x.features, 0, x.position_stride, x.feature_stride};
}

// Sample n with its features as rows: (features, T).
inline Rows by_feature(const Batch& x, int64_t n) {
    return {at_element(x.data, x.dtype, n * x.batch_stride), x.dtype, 1, x.features, x.positions, 0, x.feature_stride, x.position_stride};
}

// Rough cycles of products (rows x cols) over k, `half`: upper triangle only. Rates: 16 cycles a tile product on AMX,
// two vector multiply-adds a cycle elsewhere.
template <class T>
double product_cycles(const Engine<T>& engine, bool thrice, int64_t rows, int64_t cols, int64_t k, bool half) {
    const double panel = double(engine.panel);
    if (engine.tier == Tier::amx) {
        double blocks = double(ceil_div(rows, engine.panel)) * double(ceil_div(cols, engine.panel));
        if (half) blocks = (blocks + double(ceil_div(rows, engine.panel))) / 2;
        return blocks * (double(ceil_div(k, engine.k_align)) * (thrice ? 220.0 : 85.0) + 250.0);
    }
    const double strip = panel / 3;
    double size = double(ceil_div(rows, int64_t(strip / 2))) * (strip / 2) * double(ceil_div(cols, int64_t(strip))) * strip;
    if (half) size = size / 2 + panel * double(rows) / 2;
    return size * (double(k) / (2 * strip) + 0.1);
}

// Rough cycles of packing that many elements.
template <class T>
double pack_cycles(const Engine<T>& engine, int64_t elements, bool across) {
    if (engine.tier == Tier::amx) return double(elements) * (across ? 0.9 : 0.6);
    return double(elements) * (across ? 0.5 : 0.25);
}

}  // namespace hvpfast

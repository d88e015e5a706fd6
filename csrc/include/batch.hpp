// Views of one sample of a batch, a matrix packed whole, and what a product of panels costs.
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

// The samples that come next, fetched line by line while blocks are multiplied: memory answers in hundreds of cycles.
class Upcoming {
public:
    // Sample n of x, if its values are one piece of memory.
    void add(const Batch& x, int64_t n) {
        const int64_t values = x.positions * x.features, size = x.dtype == Dtype::f64 ? 8 : x.dtype == Dtype::f32 ? 4 : 2;
        const bool rows = x.feature_stride == 1 && x.position_stride == x.features, columns = x.position_stride == 1 && x.feature_stride == x.positions;
        if (n >= x.batch || !(rows || columns) || values * size > (int64_t(1) << 19)) return;
        ranges_[count_++] = {static_cast<const char*>(at_element(x.data, x.dtype, n * x.batch_stride)), values * size / 64};
    }
    void spread(int64_t calls) { each_ = ceil_div(ranges_[0].lines + ranges_[1].lines, most(1, calls)); }
    Ahead take() {
        Range& range = ranges_[0].lines > 0 ? ranges_[0] : ranges_[1];
        const Ahead found{nullptr, range.at, least(each_, range.lines)};
        range.at += 64 * found.count;
        range.lines -= found.count;
        return found;
    }

private:
    struct Range {
        const char* at = nullptr;
        int64_t lines = 0;
    };
    Range ranges_[2];
    int count_ = 0;
    int64_t each_ = 0;
};

constexpr int64_t kDepth = 256;  // rows packed at a time; longer sums go through a block of sums (accuracy: engine.hpp)

// A matrix packed whole: k in slices, [slice][panel]. AMX adds pairs of rows at a time, so that its slices may be longer.
template <class T>
struct Packed {
    const Engine<T>& engine;
    int64_t features, k, deepest, panels, slices;
    Packed(const Engine<T>& with, int64_t wide, int64_t deep)
        : engine(with), features(wide), k(deep), deepest(with.tier == Tier::amx ? 4 * kDepth : kDepth),
          panels(ceil_div(wide, with.panel)), slices(ceil_div(deep, deepest)) {}
    int64_t slice_bytes() const { return panels * engine.panel_bytes(least(k, deepest)); }
    int64_t bytes() const { return slices * slice_bytes(); }
    int64_t depth(int64_t slice) const { return least(deepest, k - slice * deepest); }
    const char* at(const char* base, int64_t slice, int64_t panel) const {
        return base + slice * slice_bytes() + panel * engine.panel_bytes(depth(slice));
    }
    int64_t width(int64_t panel) const { return least(engine.panel, features - panel * engine.panel); }
    // `low`: for each feature of the panels, the sum of its squared low halves is added here; may be null.
    // `squares`: those of the values, by an engine that can.
    void pack(const Rows& x, char* left, char* right, PackStats* stats, float* low = nullptr, bool squares = false) const {
        for (int64_t slice = 0; slice < slices; ++slice)
            for (int64_t p = 0; p < panels; ++p) {
                stats->low_squares = low == nullptr ? nullptr : low + p * engine.panel;
                const int64_t at = slice * slice_bytes() + p * engine.panel_bytes(depth(slice));
                char *const a = left == nullptr ? nullptr : left + at, *const b = right == nullptr ? nullptr : right + at;
                if (squares) engine.pack_squares(x, slice * deepest, depth(slice), p, a, b, stats);
                else engine.pack(x, slice * deepest, depth(slice), p, false, a, b, stats);
            }
    }
};

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
    if (engine.tier == Tier::amx) return double(elements) * (across ? 1.1 : 0.9);
    return double(elements) * (across ? 0.5 : 0.25);
}

}  // namespace hvpfast

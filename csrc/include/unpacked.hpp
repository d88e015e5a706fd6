// g'a of one sample without packing, for long samples of few features: packing would cost as much as the product.
#pragma once

#include "batch.hpp"

namespace hvpfast {

// Whether the features of a batch lie side by side, in the kernel's own type.
template <class T>
bool adjacent(const Batch& x) {
    return x.feature_stride == 1 && x.position_stride >= x.features && x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
}

template <class T>
struct Unpacked {
    static constexpr int64_t kRows = 128;  // rows at a time: the operands stay in L1 while the panels pass

    const Engine<T>& engine;
    int64_t tail;  // last rows, which are copied: a panel may not end past the data

    Unpacked(const Engine<T>& with, const Batch& a, const Batch& g)
        : engine(with), tail(ceil_div(with.panel, most(1, least(a.position_stride, g.position_stride)))) {}

    static bool pays(const Engine<T>& engine, const Batch& a, const Batch& g) {
        return engine.direct != nullptr && adjacent<T>(a) && adjacent<T>(g) && a.positions >= kRows && most(a.features, g.features) <= 2 * engine.panel;
    }

    int64_t scratch() const { return 2 * tail * 2 * engine.panel; }  // elements

    // `add(o, i, c)` gets each block of (O, I), panel * panel, of sample n of a and sample m of g; `c` is overwritten.
    template <class Add>
    void product(const Batch& a, int64_t n, const Batch& g, int64_t m, T* scratch, T* c, const Add& add) const {
        const int64_t panel = engine.panel, t = a.positions, whole = most(0, t - tail), wide = 2 * panel;
        const Flat<T> right{static_cast<const T*>(at_element(a.data, a.dtype, n * a.batch_stride)), a.position_stride, a.features};
        const Flat<T> left{static_cast<const T*>(at_element(g.data, g.dtype, m * g.batch_stride)), g.position_stride, g.features};
        const Flat<T> last_right{scratch, wide, a.features}, last_left{scratch + tail * wide, wide, g.features};
        copy(right, whole, t, scratch);
        copy(left, whole, t, scratch + tail * wide);
        for (int64_t o = 0; o < g.features; o += panel)
            for (int64_t i = 0; i < a.features; i += panel) {
                const int64_t no = least(panel, g.features - o), ni = least(panel, a.features - i);
                engine.direct(Mode::store, last_left.at(0, o, no), last_right.at(0, i, ni), t - whole, false, false, c);
                for (int64_t row = 0; row < whole; row += kRows)
                    engine.direct(Mode::add, left.at(row, o, no), right.at(row, i, ni), least(kRows, whole - row), false,
                                  o == 0 && i == 0, c);
                add(o, i, no, ni, c);
            }
    }

private:
    void copy(const Flat<T>& from, int64_t first, int64_t last, T* to) const {
        for (int64_t row = first; row < last; ++row, to += 2 * engine.panel)
            for (int64_t f = 0; f < 2 * engine.panel; ++f) to[f] = f < from.features ? from.data[row * from.pitch + f] : T(0);
    }
};

}  // namespace hvpfast

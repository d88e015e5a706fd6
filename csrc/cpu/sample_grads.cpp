// sample_grads: out[m] = g_m' a_{m % N}, (M, O, I).
//
// T = 1: an outer product a sample, bound by writing the result; rows of all samples are shared out to the threads.
// T > 1: packed panels, each block of a product copied from L1 to its place. A result larger than the caches is
// written past them where its rows are aligned: memory is then written and not read first.
#include "batch.hpp"
#include "rowwise.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

template <class T>
void outer_products(const Rowwise<T>& rowwise, const Batch& a, const Batch& g, const Samples& out, bool stream, int threads) {
    const int64_t i = a.features, o = g.features, rows = g.batch * o;
    if (rows * i < (1 << 15)) threads = 1;
    Carver carver;
    const int64_t row_at = carver.take(i * int64_t(sizeof(T))), column_at = carver.take(o * int64_t(sizeof(T)));
    const int64_t each = carver.used;
    char* const base = workspace(each * threads);
    const bool own = a.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
    parallel(threads, [&](int index, int count) {
        T* const held_row = reinterpret_cast<T*>(base + index * each + row_at);
        T* const held_column = reinterpret_cast<T*>(base + index * each + column_at);
        const int64_t first = rows * index / count, last = rows * (index + 1) / count;
        for (int64_t at = first; at < last;) {
            const int64_t m = at / o, o0 = at % o, some = least(o - o0, last - at);
            const void* const a_row = at_element(a.data, a.dtype, m % a.batch * a.batch_stride);
            const void* const g_row = at_element(g.data, g.dtype, m * g.batch_stride + o0 * g.feature_stride);
            const T *row = static_cast<const T*>(a_row), *column = static_cast<const T*>(g_row);
            if (!own || a.feature_stride != 1) rowwise.widen(a_row, a.dtype, a.feature_stride, i, held_row), row = held_row;
            if (!own || g.feature_stride != 1) rowwise.widen(g_row, g.dtype, g.feature_stride, some, held_column), column = held_column;
            T* const to = static_cast<T*>(out.data) + m * out.sample_stride + o0 * out.row_stride;
            if (out.col_stride == 1) {
                rowwise.outer(column, some, row, i, to, out.row_stride, stream);
            } else {
                for (int64_t r = 0; r < some; ++r)
                    for (int64_t c = 0; c < i; ++c) to[r * out.row_stride + c * out.col_stride] = column[r] * row[c];
            }
            at += some;
        }
        if (stream) rowwise.flush();
    });
}

// False if a reduced-precision engine met values outside its range.
template <class T>
bool products_with(const Engine<T>& engine, const Rowwise<T>& rowwise, const Batch& a, const Batch& g, const Samples& out, bool stream,
                   int threads) {
    const int64_t n_all = a.batch, columns = g.batch / n_all, panel = engine.panel;
    const Packed<T> left(engine, g.features, a.positions), right(engine, a.features, a.positions);
    const int64_t splits = g.batch >= threads ? 1 : least(threads, left.panels);  // few samples: the threads share each one
    const int64_t jobs = g.batch * splits;
    Carver carver;
    const int64_t left_at = carver.take(left.bytes()), right_at = carver.take(right.bytes());
    const int64_t block_at = carver.take(panel * panel * int64_t(sizeof(T)));
    // Streamed rows leave as a whole, gathered in L2: pieces of a panel's width fill memory at half the rate.
    const int64_t strip = panel * a.features * int64_t(sizeof(T));
    const bool gather = stream && out.col_stride == 1 && strip <= l2_bytes() / 2;
    // A right operand that L2 does not hold is gone through once for as many left panels as stay there.
    const int64_t panel_bytes = left.bytes() / most(1, left.panels) + (gather ? strip : 0);
    const int64_t together = right.bytes() <= l2_bytes() / 2 ? 1 : most(1, least(left.panels, l2_bytes() * 3 / 4 / panel_bytes));
    const int64_t strip_at = carver.take(gather ? together * strip : 0);
    const int64_t each = carver.used;
    char* const base = workspace(each * threads + 2 * threads * 4);
    uint32_t* const seen = reinterpret_cast<uint32_t*>(base + each * threads);
    for (int t = 0; t < 2 * threads; ++t) seen[t] = 0;
    parallel(threads, [&](int index, int count) {
        char *const l = base + index * each + left_at, *const r = base + index * each + right_at;
        T* const block = reinterpret_cast<T*>(base + index * each + block_at);
        T* const rows = reinterpret_cast<T*>(base + index * each + strip_at);
        PackStats of_a, of_g;
        int64_t packed = -1;
        engine.begin();
        for (int64_t job = jobs * index / count; job < jobs * (index + 1) / count; ++job) {
            const int64_t item = job / splits, split = job % splits;  // samples that share an input follow each other
            const int64_t n = item / columns, m = item % columns * n_all + n;
            left.pack(by_position(g, m), l, engine.one_form ? l : nullptr, &of_g);
            if (n != packed) right.pack(by_position(a, n), engine.one_form ? r : nullptr, r, &of_a);
            packed = n;
            T* const to = static_cast<T*>(out.data) + m * out.sample_stride;
            const int64_t end = left.panels * (split + 1) / splits;
            for (int64_t first = left.panels * split / splits; first < end; first += together) {
                const int64_t last = least(end, first + together);
                for (int64_t i = 0; i < right.panels; ++i)
                    for (int64_t o = first; o < last; ++o) {
                        for (int64_t slice = 0; slice < left.slices; ++slice)
                            engine.block(slice ? Mode::add : Mode::store, left.at(l, slice, o), right.at(r, slice, i), left.width(o),
                                         right.width(i), left.depth(slice), false, block, nullptr);
                        T* const here = to + o * panel * out.row_stride + i * panel * out.col_stride;
                        if (gather) {
                            rowwise.copy(block, panel, left.width(o), right.width(i), rows + (o - first) * panel * a.features + i * panel,
                                         a.features, false);
                        } else if (out.col_stride == 1) {
                            rowwise.copy(block, panel, left.width(o), right.width(i), here, out.row_stride, stream);
                        } else {
                            for (int64_t row = 0; row < left.width(o); ++row)
                                for (int64_t c = 0; c < right.width(i); ++c)
                                    here[row * out.row_stride + c * out.col_stride] = block[row * panel + c];
                        }
                    }
                for (int64_t o = first; gather && o < last; ++o)
                    rowwise.copy(rows + (o - first) * panel * a.features, a.features, left.width(o), a.features,
                                 to + o * panel * out.row_stride, out.row_stride, true);
            }
        }
        engine.end();
        if (stream) rowwise.flush();
        seen[2 * index] = of_a.largest;
        seen[2 * index + 1] = of_g.largest;
    });
    uint32_t largest_a = 0, largest_g = 0;
    for (int t = 0; t < threads; ++t) {
        largest_a = seen[2 * t] > largest_a ? seen[2 * t] : largest_a;
        largest_g = seen[2 * t + 1] > largest_g ? seen[2 * t + 1] : largest_g;
    }
    return engine.tier != Tier::amx || bf16_holds(largest_a, largest_g);
}

template <class T>
void grads(const Engine<T>& vector, const Rowwise<T>& rowwise, const Batch& a, const Batch& g, const Samples& out, Precision precision,
           int threads) {
    const int64_t i = a.features, o = g.features, t = a.positions;
    const int64_t bytes = g.batch * o * i * int64_t(sizeof(T));
    const bool dense = out.col_stride == 1 && out.row_stride == i && out.sample_stride == o * i;
    const bool stream = bytes > kStreamed && !(dense && untouched(out.data, bytes));
    if (t == 1) return outer_products(rowwise, a, g, out, stream, threads);
    const auto cost = [&](const Engine<T>& engine, bool thrice) {
        return product_cycles(engine, thrice, o, i, t, false) + pack_cycles(engine, t * (o + i), false);
    };
    const double exact = cost(vector, false);
    if (double(g.batch) * exact < 40000.0) threads = 1;  // cycles: waking a thread costs as much
    if constexpr (sizeof(T) == 4) {
        if (tier_in_use() == Tier::amx) {
            const bool whole = a.dtype != Dtype::f32;  // 16-bit products are exact; float32 data are split only where asked for
            const bool automatic = precision == Precision::automatic;
            const Engine<float>* amx = engine_amx(precision, a.dtype);
            const bool few = !whole && (t < 32 || o * i < 256);
            const bool pays = !automatic || (amx != nullptr && cost(*amx, !whole && precision == Precision::bf16x3) < exact);
            if (amx != nullptr && !few && pays && products_with(*amx, rowwise, a, g, out, stream, threads)) return;
        }
    }
    products_with(vector, rowwise, a, g, out, stream, threads);
}

}  // namespace

void sample_grads(const Batch& a, const Batch& g, const Samples& out, Precision precision, int threads) {
    if (!threads_allowed || threads < 1) threads = 1;
    if (g.batch == 0 || a.features == 0 || g.features == 0) return;
    const bool wide = a.dtype == Dtype::f64;
    if (a.positions == 0) {
        for (int64_t m = 0; m < g.batch; ++m)
            for (int64_t r = 0; r < g.features; ++r)
                for (int64_t c = 0; c < a.features; ++c) {
                    const int64_t at = m * out.sample_stride + r * out.row_stride + c * out.col_stride;
                    wide ? static_cast<double*>(out.data)[at] = 0 : static_cast<float*>(out.data)[at] = 0;
                }
        return;
    }
    const Tier tier = tier_in_use();
    if (wide) grads(engine_f64(tier), rowwise_f64(tier), a, g, out, precision, threads);
    else grads(engine_f32(tier), rowwise_f32(tier), a, g, out, precision, threads);
}

}  // namespace hvpfast

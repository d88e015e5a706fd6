// sample_norms_squared: || g_m' a_m ||_F^2 without an (M, O, I) array, by the cheapest of four routes.
//
// T = 1: ||a||^2 ||g||^2. Otherwise, a sample at a time: `direct` forms g_m' a_m block by block and sums the squares
// (2 T I O flop); `gram` forms the upper blocks of a a' and g g' over the positions and sums their products
// (T^2 (I + O) flop). Nothing larger than a block is kept, except a a' where several g share it. `rows` does the latter
// without packing, which for a few positions takes longer than the products.
#include "batch.hpp"
#include "rowwise.hpp"
#include "tiers.hpp"
#include "unpacked.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

// Sum of (left' right) o other over one block, `other` null: of squares. `scratch`: one block.
template <class T>
double block_sum(const Packed<T>& left, const char* a, int64_t i, const Packed<T>& right, const char* b, int64_t j, T* other, T* scratch,
                 const Ahead& ahead) {
    const Engine<T>& engine = left.engine;
    const int64_t ni = left.width(i), nj = right.width(j), panel = engine.panel;
    if (left.slices == 1)
        return engine.block(other == nullptr ? Mode::sum_square : Mode::dot, left.at(a, 0, i), right.at(b, 0, j), ni, nj, left.k,
                            false, other, &ahead);
    for (int64_t slice = 0; slice < left.slices; ++slice)
        engine.block(slice ? Mode::add : Mode::store, left.at(a, slice, i), right.at(b, slice, j), ni, nj, left.depth(slice), false,
                     scratch, slice ? nullptr : &ahead);
    double sum = 0;
    for (int64_t r = 0; r < ni; ++r)
        for (int64_t c = 0; c < nj; ++c) {
            const T value = scratch[r * panel + c];
            sum += double(value) * double(other == nullptr ? value : other[r * panel + c]);
        }
    return sum;
}

template <class T>
void store_block(const Packed<T>& x, const char* a, int64_t i, const char* b, int64_t j, T* c, const Ahead& ahead) {
    for (int64_t slice = 0; slice < x.slices; ++slice)
        x.engine.block(slice ? Mode::add : Mode::store, x.at(a, slice, i), x.at(b, slice, j), x.width(i), x.width(j), x.depth(slice),
                       false, c, slice ? nullptr : &ahead);
}

double least_of(double a, double b) { return a < b ? a : b; }

struct Costs {
    double direct, gram;
    double least() const { return least_of(direct, gram); }
};

template <class T>
Costs costs(const Engine<T>& engine, bool thrice, const Batch& a, const Batch& g) {
    const int64_t t = a.positions, i = a.features, o = g.features;
    const double k = double(g.batch) / double(a.batch);
    const bool keep = k > 1 && t * t <= (1 << 18);
    Costs found;
    found.direct = k * product_cycles(engine, thrice, o, i, t, false);
    if (!Unpacked<T>::pays(engine, a, g))
        found.direct += pack_cycles(engine, t * i, a.feature_stride != 1) + k * pack_cycles(engine, t * o, g.feature_stride != 1);
    found.gram = k * product_cycles(engine, thrice, t, t, o, true) + (keep ? 1 : k) * product_cycles(engine, thrice, t, t, i, true) +
                 pack_cycles(engine, t * i, a.position_stride != 1) + k * pack_cycles(engine, t * o, g.position_stride != 1);
    return found;
}

// False if a reduced-precision engine met values outside its range.
template <class T>
bool norms_with(const Engine<T>& engine, bool by_gram, const Batch& a, const Batch& g, T* out, int threads) {
    const int64_t n_all = a.batch, m_all = g.batch, columns = m_all / n_all, t = a.positions;
    const Packed<T> left = by_gram ? Packed<T>(engine, t, a.features) : Packed<T>(engine, a.features, t);
    const Packed<T> right = by_gram ? Packed<T>(engine, t, g.features) : Packed<T>(engine, g.features, t);
    const int64_t panels = left.panels, pairs = by_gram ? panels * (panels + 1) / 2 : panels * right.panels;
    const int64_t block = engine.panel * engine.panel;
    const bool keep = by_gram && columns > 1 && t * t <= (1 << 18);  // a a', shared by the columns
    const int64_t splits = m_all >= threads ? 1 : threads;           // few samples: the threads share each one's blocks

    const int64_t held = most(1, l2_bytes() / 3 / most(1, right.bytes() / most(1, right.panels)));
    const int64_t forms = engine.one_form ? 1 : 2;
    Carver carver;
    const int64_t a_at = carver.take(forms * left.bytes()), g_at = carver.take(forms * right.bytes());
    const int64_t sums_at = carver.take((keep ? pairs : 1) * block * int64_t(sizeof(T))), scratch_at = carver.take(block * int64_t(sizeof(T)));
    // What a split leaves out of the diagonals of a a' and g g'.
    const int64_t low_features = by_gram && engine.tier == Tier::amx ? panels * engine.panel : 0, low_at = carver.take(2 * low_features * 4);
    const int64_t each = carver.used;
    char* const base = workspace(each * threads + (splits * m_all * 8 + 64) + 2 * threads * 4);
    double* const partial = reinterpret_cast<double*>(base + each * threads);
    uint32_t* const seen = reinterpret_cast<uint32_t*>(base + each * threads + splits * m_all * 8);

    int used = 1;
    parallel(threads, [&](int index, int count) {
        char* const mine = base + each * index;
        char *const a_left = mine + a_at, *const a_right = forms == 2 ? a_left + left.bytes() : a_left;
        char *const g_left = mine + g_at, *const g_right = forms == 2 ? g_left + right.bytes() : g_left;
        T *const sums = reinterpret_cast<T*>(mine + sums_at), *const scratch = reinterpret_cast<T*>(mine + scratch_at);
        float* const low_a = low_features ? reinterpret_cast<float*>(mine + low_at) : nullptr;
        float* const low_g = low_features ? low_a + low_features : nullptr;
        PackStats of_a, of_g;
        engine.begin();
        if (index == 0) used = count;
        const int64_t parts = splits == 1 ? 1 : count, part = splits == 1 ? 0 : index;
        const int64_t first = splits == 1 ? m_all * index / count : 0, last = splits == 1 ? m_all * (index + 1) / count : m_all;
        int64_t packed = -1;
        for (int64_t item = first; item < last; ++item) {  // samples with the same input come one after another
            const int64_t n = item / columns, m = (item % columns) * n_all + n;
            const bool fresh = n != packed;
            packed = n;
            double sum = 0;
            Upcoming next;
            if (item + 1 < last) {
                if ((item + 1) % columns == 0) next.add(a, n + 1);
                next.add(g, ((item + 1) % columns) * n_all + (item + 1) / columns);
            }
            next.spread(by_gram && (fresh || !keep) ? 2 * pairs : pairs);
            if (by_gram) {
                for (int64_t f = fresh ? 0 : low_features; f < low_features; ++f) low_a[f] = 0;
                for (int64_t f = 0; f < low_features; ++f) low_g[f] = 0;
                if (fresh) left.pack(by_feature(a, n), a_left, a_right, &of_a, low_a);
                right.pack(by_feature(g, m), g_left, g_right, &of_g, low_g);
                int64_t pair = 0;
                for (int64_t j = 0; j < panels; ++j)
                    for (int64_t i = 0; i <= j; ++i, ++pair) {
                        if (pair % parts != part) continue;
                        T* const c = sums + (keep ? pair * block : 0);
                        if (fresh || !keep) {
                            store_block(left, a_left, i, a_right, j, c, next.take());
                            if (i == j && low_features)
                                for (int64_t r = 0; r < left.width(i); ++r) c[r * (engine.panel + 1)] += T(low_a[i * engine.panel + r]);
                        }
                        if (i == j && low_features)
                            for (int64_t r = 0; r < left.width(i); ++r) sum += double(low_g[i * engine.panel + r]) * double(c[r * (engine.panel + 1)]);
                        sum += (i == j ? 1 : 2) * block_sum(right, g_left, i, right, g_right, j, c, scratch, next.take());
                    }
            } else {
                if (fresh) left.pack(by_position(a, n), forms == 2 ? nullptr : a_left, a_right, &of_a);
                right.pack(by_position(g, m), g_left, forms == 2 ? nullptr : g_left, &of_g);
                int64_t pair = 0;
                for (int64_t i0 = 0; i0 < right.panels; i0 += held)  // these stay in L2 while the panels of a pass
                    for (int64_t j = 0; j < panels; ++j)
                        for (int64_t i = i0; i < least(right.panels, i0 + held); ++i, ++pair)
                            if (pair % parts == part)
                                sum += block_sum<T>(right, g_left, i, left, a_right, j, nullptr, scratch, next.take());
            }
            partial[part * m_all + m] = sum;
        }
        engine.end();
        seen[2 * index] = of_a.largest;
        seen[2 * index + 1] = of_g.largest;
    });
    uint32_t largest_a = 0, largest_g = 0;
    for (int t = 0; t < used; ++t) {
        largest_a = seen[2 * t] > largest_a ? seen[2 * t] : largest_a;
        largest_g = seen[2 * t + 1] > largest_g ? seen[2 * t + 1] : largest_g;
    }
    if (engine.tier == Tier::amx && !bf16_holds(largest_a, largest_g)) return false;
    for (int64_t m = 0; m < m_all; ++m) {
        double sum = 0;
        for (int64_t part = 0; part < (splits == 1 ? 1 : used); ++part) sum += partial[part * m_all + m];
        out[m] = T(sum);
    }
    return true;
}

template <class T>
void rank_one(const Engine<T>& engine, const Batch& a, const Batch& g, T* out, int threads) {
    const Rows left{a.data, a.dtype, 1, a.batch, a.features, 0, a.batch_stride, a.feature_stride};
    const Rows right{g.data, g.dtype, 1, g.batch, g.features, 0, g.batch_stride, g.feature_stride};
    double* const inputs = reinterpret_cast<double*>(workspace(a.batch * 8));
    if (a.batch * a.features + g.batch * g.features < (1 << 16)) threads = 1;
    parallel(threads, [&](int index, int count) {
        for (int64_t n = a.batch * index / count; n < a.batch * (index + 1) / count; ++n) inputs[n] = engine.row_squares(left, n);
        barrier(count);
        for (int64_t m = g.batch * index / count; m < g.batch * (index + 1) / count; ++m)
            out[m] = T(inputs[m % a.batch] * engine.row_squares(right, m));
    });
}

const Rowwise<float>& row_kernels(float) { return rowwise_f32(tier_in_use()); }
const Rowwise<double>& row_kernels(double) { return rowwise_f64(tier_in_use()); }

// Rough cycles of the route by rows: two multiply-adds a cycle, and 8 to add up a vector, or 3 where a square's are added together.
template <class T>
double row_cycles(const Batch& a, const Batch& g) {
    const Rowwise<T>& rowwise = row_kernels(T());
    const double side = double(ceil_div(a.positions, rowwise.side)), square = double(rowwise.side * rowwise.side);
    const double adding = rowwise.side * rowwise.side == rowwise.width ? 3 : 8;
    const double products = side * (side + 1) / 2 * square, k = double(g.batch) / double(a.batch);
    return products * (double(ceil_div(a.features, rowwise.width)) / 2 + adding) + k * products * double(ceil_div(g.features, rowwise.width)) / 2;
}

template <class T>
void norms_by_rows(const Batch& a, const Batch& g, T* out, int threads) {
    const Rowwise<T>& rowwise = row_kernels(T());
    const int64_t n_all = a.batch, m_all = g.batch, columns = m_all / n_all, t = a.positions;
    const int64_t side = ceil_div(t, rowwise.side), each = (side * (side + 1) / 2 * rowwise.side * rowwise.side + 15) / 16 * 16;
    T* const base = reinterpret_cast<T*>(workspace(threads * each * int64_t(sizeof(T))));
    parallel(threads, [&](int index, int count) {
        T* const weights = base + index * each;
        int64_t weighed = -1;
        const auto row_of = [&](const Batch& x, int64_t sample) { return static_cast<const T*>(x.data) + sample * x.batch_stride; };
        const auto after = [&](const Batch& x, int64_t sample) {
            return sample + 1 < x.batch && x.position_stride == x.features && x.batch_stride == t * x.features ? row_of(x, sample + 1) : nullptr;
        };
        for (int64_t item = m_all * index / count; item < m_all * (index + 1) / count; ++item) {
            const int64_t n = item / columns, m = (item % columns) * n_all + n;
            if (n != weighed) rowwise.row_products(row_of(a, n), a.position_stride, t, a.features, true, weights, after(a, n));
            weighed = n;
            out[m] = T(rowwise.row_products(row_of(g, m), g.position_stride, t, g.features, false, weights, columns == 1 ? after(g, m) : nullptr));
        }
    });
}

template <class T>
void norms_unpacked(const Engine<T>& engine, const Batch& a, const Batch& g, T* out, int threads) {
    const Unpacked<T> work(engine, a, g);
    const int64_t each = work.scratch() + engine.panel * engine.panel;
    T* const base = reinterpret_cast<T*>(workspace(threads * each * int64_t(sizeof(T))));
    parallel(threads, [&](int index, int count) {
        T *const c = base + index * each, *const scratch = c + engine.panel * engine.panel;
        for (int64_t m = g.batch * index / count; m < g.batch * (index + 1) / count; ++m) {
            double sum = 0;
            work.product(a, m % a.batch, g, m, scratch, c, [&](int64_t, int64_t, int64_t rows, int64_t cols, const T* block) {
                for (int64_t r = 0; r < rows; ++r) sum += row_kernels(T()).squares(block + r * engine.panel, cols);
            });
            out[m] = T(sum);
        }
    });
}

template <class T>
void norms(const Engine<T>& vector, const Batch& a, const Batch& g, T* out, Precision precision, int threads) {
    if (a.positions == 1) return rank_one(vector, a, g, out, threads);
    const Costs exact = costs(vector, false, a, g);
    const bool few_rows = a.positions <= 128 && adjacent<T>(a) && adjacent<T>(g);
    const double by_rows = few_rows ? row_cycles<T>(a, g) : exact.least();
    if (double(a.batch) * least_of(by_rows, exact.least()) < 40000.0) threads = 1;  // cycles: waking a thread costs as much
    if constexpr (sizeof(T) == 4) {
        if (tier_in_use() == Tier::amx) {
            // full float32 is within the bound of bf16x3, too: the faster one
            const bool automatic = precision == Precision::automatic || precision == Precision::bf16x3;
            if (automatic) precision = Precision::bf16x3;
            const Engine<float>* amx = engine_amx(precision, a.dtype);
            const bool few = a.dtype == Dtype::f32 && (a.positions < (automatic ? 32 : 8) || a.features * g.features < 256);
            if (amx != nullptr && !few) {
                const Costs fast = costs(*amx, a.dtype == Dtype::f32 && precision == Precision::bf16x3, a, g);
                if ((!automatic || fast.least() < least_of(by_rows, exact.least())) && norms_with(*amx, fast.gram < fast.direct, a, g, out, threads)) return;
            }
        }
    }
    if (by_rows < exact.least()) {
        // without columns the two change places: vectors are added up for the first only
        if (a.batch == g.batch && g.features < a.features) return norms_by_rows(g, a, out, threads);
        return norms_by_rows(a, g, out, threads);
    }
    if (exact.direct <= exact.gram && g.batch >= threads && Unpacked<T>::pays(vector, a, g)) return norms_unpacked(vector, a, g, out, threads);
    norms_with(vector, exact.gram < exact.direct, a, g, out, threads);
}

}  // namespace

void sample_norms_squared(const Batch& a, const Batch& g, void* out, Precision precision, int threads) {
    if (!threads_allowed || threads < 1) threads = 1;
    if (g.batch == 0) return;
    const bool wide = a.dtype == Dtype::f64;
    if (a.positions == 0 || a.features == 0 || g.features == 0) {
        for (int64_t m = 0; m < g.batch; ++m) wide ? static_cast<double*>(out)[m] = 0 : static_cast<float*>(out)[m] = 0;
        return;
    }
    if (wide) norms(engine_f64(tier_in_use()), a, g, static_cast<double*>(out), precision, threads);
    else norms(engine_f32(tier_in_use()), a, g, static_cast<float*>(out), precision, threads);
}

}  // namespace hvpfast

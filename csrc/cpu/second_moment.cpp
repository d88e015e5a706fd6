// second_moment: sum_m (g_m' a_m) o (g_m' a_m), (O, I), without an (M, O, I) array.
//
// T = 1: a product of squares, (g o g)' (a o a), the squares formed a slice of samples at a time (and summed over the
// columns, which share a). T > 1: each block of g_m' a_m is squared into the running sums as it leaves the registers;
// the sums are cut so that a thread's part stays in its L2 while the samples pass.
#include "batch.hpp"
#include "scalar.hpp"
#include "tiers.hpp"
#include "unpacked.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

// After so many samples (slices of them, where T = 1) the running sums join a total and start again: a float32 sum of
// millions of squares would stand still.
constexpr int64_t kRun = 512;

template <class T>
class Running {
public:
    Running(T* sums, int64_t size, bool total) : sums_(sums), size_(size), total_(total ? sums + size : nullptr) {
        for (int64_t e = 0; e < size_ * (total ? 2 : 1); ++e) sums_[e] = 0;
    }
    void next() {
        if (total_ != nullptr && ++count_ % kRun == 0) carry();
    }
    void finish() {
        if (total_ == nullptr) return;
        carry();
        for (int64_t e = 0; e < size_; ++e) sums_[e] = total_[e];
    }

private:
    void carry() {
        for (int64_t e = 0; e < size_; ++e) total_[e] += sums_[e], sums_[e] = 0;
    }
    T* sums_;
    int64_t size_;
    T* total_;
    int64_t count_ = 0;
};

struct Part {  // panels [o0, o1) x [i0, i1) of the sums, samples [m0, m1) of M in n-major order
    int64_t o0, o1, i0, i1, m0, m1;
    int64_t blocks() const { return (o1 - o0) * (i1 - i0); }
};

// A grid of parts: the output first, the samples where the output has too few parts for the threads.
struct Grid {
    int64_t o_step, i_step, o_count, i_count, sample_groups;
    int64_t parts() const { return o_count * i_count; }
};

template <class T>
Grid choose_grid(const Engine<T>& engine, int64_t o_panels, int64_t i_panels, int64_t samples, int threads) {
    const int64_t held = most(1, l2_bytes() / 2 / (engine.panel * engine.panel * int64_t(sizeof(T))));
    Grid grid;
    int64_t side = 1;
    while ((side + 1) * (side + 1) <= held) ++side;
    grid.o_step = least(o_panels, most(side, held / i_panels));
    grid.i_step = least(i_panels, most(1, held / grid.o_step));
    grid.o_count = ceil_div(o_panels, grid.o_step);
    grid.i_count = ceil_div(i_panels, grid.i_step);
    grid.o_step = ceil_div(o_panels, grid.o_count);
    grid.i_step = ceil_div(i_panels, grid.i_count);
    grid.sample_groups = grid.parts() % threads == 0 || grid.parts() > 4 * threads ? 1 : least(threads, samples);
    return grid;
}

template <class T>
void write_sums(const T* sums, int64_t panel, const Part& part, int64_t copies, int64_t apart, const Out& out) {
    for (int64_t o = part.o0; o < part.o1; ++o)
        for (int64_t i = part.i0; i < part.i1; ++i) {
            const T* from = sums + ((o - part.o0) * (part.i1 - part.i0) + i - part.i0) * panel * panel;
            const int64_t rows = least(panel, out.rows - o * panel), cols = least(panel, out.cols - i * panel);
            for (int64_t r = 0; r < rows; ++r, from += panel) {
                T* const to = static_cast<T*>(out.data) + (o * panel + r) * out.row_stride + i * panel * out.col_stride;
                if (out.col_stride == 1) {
                    for (int64_t c = 0; c < cols; ++c) to[c] = from[c];
                    for (int64_t copy = 1; copy < copies; ++copy)
                        for (int64_t c = 0; c < cols; ++c) to[c] += from[copy * apart + c];
                    continue;
                }
                for (int64_t c = 0; c < cols; ++c) {
                    T sum = from[c];
                    for (int64_t copy = 1; copy < copies; ++copy) sum += from[copy * apart + c];
                    to[c * out.col_stride] = sum;
                }
            }
        }
}

double value_at(const Batch& x, int64_t offset) {
    switch (x.dtype) {
        case Dtype::f32: return static_cast<const float*>(x.data)[offset];
        case Dtype::f64: return static_cast<const double*>(x.data)[offset];
        case Dtype::bf16: return bf16_to_float(static_cast<const uint16_t*>(x.data)[offset]);
        default: return f16_to_float(static_cast<const uint16_t*>(x.data)[offset]);
    }
}

// squares (rows, features) of samples n0 .. n0 + rows, summed over `columns` rows that lie `apart` samples from each other.
template <class T>
void square_rows(const Batch& x, int64_t n0, int64_t rows, int64_t columns, int64_t apart, int64_t first, int64_t features, T* squares) {
    for (int64_t r = 0; r < rows; ++r, squares += features)
        for (int64_t column = 0; column < columns; ++column) {
            const int64_t offset = (n0 + r + column * apart) * x.batch_stride + first * x.feature_stride;
            if (x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32) && x.feature_stride == 1) {
                const T* from = static_cast<const T*>(x.data) + offset;
                if (column == 0)
                    for (int64_t c = 0; c < features; ++c) squares[c] = from[c] * from[c];
                else
                    for (int64_t c = 0; c < features; ++c) squares[c] += from[c] * from[c];
            } else {
                for (int64_t c = 0; c < features; ++c) {
                    const T value = T(value_at(x, offset + c * x.feature_stride));
                    squares[c] = (column == 0 ? T(0) : squares[c]) + value * value;
                }
            }
        }
}

// What one thread needs to hold beside its sums.
template <class T>
struct Buffers {
    Packed<T> left, right;
    int64_t left_at, right_at, squares_at, scratch_at, bytes;
    Buffers(const Engine<T>& engine, int64_t o_features, int64_t i_features, int64_t depth, bool squares)
        : left(engine, o_features, depth), right(engine, i_features, depth) {
        Carver carver;
        left_at = carver.take(left.bytes());
        right_at = carver.take(right.bytes());
        squares_at = carver.take(squares ? depth * (o_features + i_features) * int64_t(sizeof(T)) : 0);
        scratch_at = carver.take(engine.panel * engine.panel * int64_t(sizeof(T)));
        bytes = carver.used;
    }
};

// The features of a batch from `first` on, `count` of them.
Batch narrowed(const Batch& x, int64_t first, int64_t count) {
    Batch part = x;
    part.data = at_element(x.data, x.dtype, first * x.feature_stride);
    part.features = count;
    return part;
}

// Samples n0 .. n0 + rows of one position as rows.
Rows sample_rows(const Batch& x, int64_t n0, int64_t rows) {
    return {at_element(x.data, x.dtype, n0 * x.batch_stride), x.dtype, 1, rows, x.features, 0, x.batch_stride, x.feature_stride};
}

// False if a reduced-precision engine met values outside its range: out is untouched then.
template <class T>
bool moments_with(const Engine<T>& engine, const Batch& a, const Batch& g, const Out& out, int threads) {
    const int64_t n_all = a.batch, columns = g.batch / n_all, panel = engine.panel, block = panel * panel;
    const bool rank_one = a.positions == 1;
    const bool squared = rank_one && engine.pack_squares != nullptr && columns == 1 && a.feature_stride == 1 && g.feature_stride == 1;
    const int64_t slice_of = engine.tier == Tier::amx ? kDepth / 2 : kDepth;  // of samples, where a slice of them is one sum
    const int64_t samples = rank_one ? ceil_div(n_all, slice_of) : g.batch;  // a slice of n, or one m, at a time
    const int64_t depth = rank_one ? least(slice_of, n_all) : a.positions;
    const int64_t o_panels = ceil_div(out.rows, panel), i_panels = ceil_div(out.cols, panel);
    const Grid grid = choose_grid(engine, o_panels, i_panels, samples, threads);
    const Buffers<T> each(engine, least(out.rows, grid.o_step * panel), least(out.cols, grid.i_step * panel), depth, rank_one);
    const bool total = samples > kRun;
    const int64_t part_size = grid.o_step * grid.i_step * block * (total ? 2 : 1);
    const int64_t jobs = grid.parts() * grid.sample_groups;

    Carver carver;
    const int64_t sums_at = carver.take((grid.sample_groups > 1 ? jobs : threads) * part_size * int64_t(sizeof(T)));
    const int64_t seen_at = carver.take(2 * threads * 4), buffers_at = carver.take(threads * each.bytes);
    char* const base = workspace(carver.used);
    T* const all_sums = reinterpret_cast<T*>(base + sums_at);
    uint32_t* const seen = reinterpret_cast<uint32_t*>(base + seen_at);

    const auto part_of = [&](int64_t job) {
        const int64_t cell = job / grid.sample_groups, group = job % grid.sample_groups;
        const int64_t o = cell / grid.i_count, i = cell % grid.i_count;
        return Part{o * grid.o_step, least(o_panels, (o + 1) * grid.o_step), i * grid.i_step, least(i_panels, (i + 1) * grid.i_step),
                    samples * group / grid.sample_groups, samples * (group + 1) / grid.sample_groups};
    };
    bool fits = true;
    parallel(threads, [&](int index, int count) {
        char* const mine = base + buffers_at + index * each.bytes;
        PackStats of_a, of_g;
        engine.begin();
        const auto add_job = [&](const Part& part, T* sums) {
            const int64_t o_first = part.o0 * panel, i_first = part.i0 * panel;
            const int64_t o_wide = least(out.rows, part.o1 * panel) - o_first, i_wide = least(out.cols, part.i1 * panel) - i_first;
            const Batch left_of = narrowed(g, o_first, o_wide), right_of = narrowed(a, i_first, i_wide);
            T* const squares = reinterpret_cast<T*>(mine + each.squares_at);
            T* const scratch = reinterpret_cast<T*>(mine + each.scratch_at);
            Running<T> running(sums, part.blocks() * block, total);
            int64_t packed_n = -1;
            for (int64_t item = part.m0; item < part.m1; ++item) {
                const int64_t rows = rank_one ? least(slice_of, n_all - item * slice_of) : depth;
                const Packed<T> left(engine, o_wide, rows), right(engine, i_wide, rows);
                char *const l = mine + each.left_at, *const r = mine + each.right_at;
                if (squared) {
                    left.pack(sample_rows(left_of, item * slice_of, rows), l, nullptr, &of_g, nullptr, true);
                    right.pack(sample_rows(right_of, item * slice_of, rows), nullptr, r, &of_a, nullptr, true);
                } else if (rank_one) {
                    T* const of_inputs = squares + rows * o_wide;
                    square_rows(left_of, item * slice_of, rows, columns, n_all, 0, o_wide, squares);
                    square_rows(right_of, item * slice_of, rows, 1, 0, 0, i_wide, of_inputs);
                    const Dtype dtype = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;
                    left.pack(Rows{squares, dtype, 1, rows, o_wide, 0, o_wide, 1}, l, engine.one_form ? l : nullptr, &of_g);
                    right.pack(Rows{of_inputs, dtype, 1, rows, i_wide, 0, i_wide, 1}, engine.one_form ? r : nullptr, r, &of_a);
                } else {
                    const int64_t n = item / columns, m = (item % columns) * n_all + n;
                    left.pack(by_position(left_of, m), l, engine.one_form ? l : nullptr, &of_g);
                    if (n != packed_n) right.pack(by_position(right_of, n), engine.one_form ? r : nullptr, r, &of_a);
                    packed_n = n;
                }
                Upcoming next;
                if (!rank_one && item + 1 < part.m1) {
                    if ((item + 1) % columns == 0) next.add(right_of, item / columns + 1);
                    next.add(left_of, ((item + 1) % columns) * n_all + (item + 1) / columns);
                }
                next.spread(left.panels * right.panels);
                T* at = sums;
                for (int64_t o = 0; o < left.panels; ++o)
                    for (int64_t i = 0; i < right.panels; ++i, at += block) {
                        const Ahead soon = next.take();
                        if (rank_one || left.slices == 1) {
                            engine.block(rank_one ? Mode::add : Mode::add_square, left.at(l, 0, o), right.at(r, 0, i), left.width(o),
                                         right.width(i), rows, false, at, &soon);
                        } else {
                            for (int64_t slice = 0; slice < left.slices; ++slice)
                                engine.block(slice ? Mode::add : Mode::store, left.at(l, slice, o), right.at(r, slice, i), left.width(o),
                                             right.width(i), left.depth(slice), false, scratch, slice ? nullptr : &soon);
                            for (int64_t e = 0; e < left.width(o) * panel; ++e) at[e] += scratch[e] * scratch[e];
                        }
                    }
                running.next();
            }
            running.finish();
        };
        for (int64_t job = jobs * index / count; job < jobs * (index + 1) / count; ++job) {
            const Part part = part_of(job);
            T* const sums = all_sums + (grid.sample_groups > 1 ? job : index) * part_size;
            add_job(part, sums);
            if (grid.sample_groups == 1 && engine.tier != Tier::amx) write_sums(sums, panel, part, 1, 0, out);
            if (grid.sample_groups == 1 && engine.tier == Tier::amx && bf16_holds(of_a.largest, of_g.largest))
                write_sums(sums, panel, part, 1, 0, out);
        }
        engine.end();
        seen[2 * index] = of_a.largest;
        seen[2 * index + 1] = of_g.largest;
        barrier(count);
        uint32_t largest_a = 0, largest_g = 0;
        for (int t = 0; t < count; ++t) {
            largest_a = seen[2 * t] > largest_a ? seen[2 * t] : largest_a;
            largest_g = seen[2 * t + 1] > largest_g ? seen[2 * t + 1] : largest_g;
        }
        if (engine.tier == Tier::amx && !bf16_holds(largest_a, largest_g)) {
            if (index == 0) fits = false;
            return;
        }
        if (grid.sample_groups > 1)
            for (int64_t cell = index; cell < grid.parts(); cell += count)
                write_sums(all_sums + cell * grid.sample_groups * part_size, panel, part_of(cell * grid.sample_groups), grid.sample_groups,
                           part_size, out);
    });
    return fits;
}

template <class T>
void moments_unpacked(const Engine<T>& engine, const Batch& a, const Batch& g, const Out& out, int threads) {
    const Unpacked<T> work(engine, a, g);
    const int64_t panel = engine.panel, block = panel * panel, i_panels = ceil_div(out.cols, panel), o_panels = ceil_div(out.rows, panel);
    const bool total = g.batch > kRun;
    const int64_t sums_size = i_panels * o_panels * block, part_size = sums_size * (total ? 2 : 1), each = part_size + block + work.scratch();
    const int64_t groups = least(threads, g.batch);
    T* const base = reinterpret_cast<T*>(workspace(groups * each * int64_t(sizeof(T))));
    parallel(int(groups), [&](int index, int count) {
        for (int64_t group = index; group < groups; group += count) {
            T *const sums = base + group * each, *const c = sums + part_size;
            Running<T> running(sums, sums_size, total);
            for (int64_t m = g.batch * group / groups; m < g.batch * (group + 1) / groups; ++m) {
                work.product(a, m % a.batch, g, m, c + block, c, [&](int64_t o, int64_t i, int64_t rows, int64_t, const T* product) {
                    T* const to = sums + (o / panel * i_panels + i / panel) * block;
                    for (int64_t e = 0; e < rows * panel; ++e) to[e] += product[e] * product[e];
                });
                running.next();
            }
            running.finish();
        }
        barrier(count);
        if (index == 0) write_sums(base, panel, Part{0, o_panels, 0, i_panels, 0, 0}, groups, each, out);
    });
}

template <class T>
void moments(const Engine<T>& vector, const Batch& a, const Batch& g, const Out& out, Precision precision, int threads) {
    const double k = a.positions == 1 ? 1.0 / double(kDepth) : double(g.batch) / double(a.batch);
    const int64_t depth = a.positions == 1 ? kDepth : a.positions;
    const bool unpacked = Unpacked<T>::pays(vector, a, g);
    const auto cost = [&](const Engine<T>& engine, bool thrice) {
        const double packing = unpacked && engine.tier != Tier::amx ? 0 : pack_cycles(engine, depth * (out.rows + out.cols), false);
        return k * product_cycles(engine, thrice, out.rows, out.cols, depth, false) + packing * (a.positions == 1 ? k : 1.0);
    };
    const double exact = cost(vector, false);
    if (double(a.batch) * exact < 40000.0) threads = 1;
    if constexpr (sizeof(T) == 4) {
        if (tier_in_use() == Tier::amx) {
            // full float32 is within the bound of bf16x3, too: the faster one
            const bool automatic = precision == Precision::automatic || precision == Precision::bf16x3;
            if (automatic) precision = Precision::bf16x3;
            // squares of 16-bit values are not 16-bit values: with T = 1 they are float32 data
            const bool squares = a.positions == 1;
            const Engine<float>* amx = squares && a.dtype != Dtype::f32 ? nullptr : engine_amx(precision, a.dtype);
            const bool few = a.dtype == Dtype::f32 && (depth < 8 || a.batch * depth < 32 || out.rows * out.cols < 256);
            const bool thrice = precision == Precision::bf16x3 && a.dtype == Dtype::f32;
            if (amx != nullptr && !few && (!automatic || cost(*amx, thrice) < exact) && moments_with(*amx, a, g, out, threads)) return;
        }
    }
    if (unpacked) return moments_unpacked(vector, a, g, out, threads);
    moments_with(vector, a, g, out, threads);
}

}  // namespace

void second_moment(const Batch& a, const Batch& g, const Out& out, Precision precision, int threads) {
    if (!threads_allowed || threads < 1) threads = 1;
    if (out.rows == 0 || out.cols == 0) return;
    const bool wide = a.dtype == Dtype::f64;
    if (g.batch == 0 || a.positions == 0) {
        for (int64_t r = 0; r < out.rows; ++r)
            for (int64_t c = 0; c < out.cols; ++c) {
                const int64_t at = r * out.row_stride + c * out.col_stride;
                wide ? static_cast<double*>(out.data)[at] = 0 : static_cast<float*>(out.data)[at] = 0;
            }
        return;
    }
    if (wide) moments(engine_f64(tier_in_use()), a, g, out, precision, threads);
    else moments(engine_f32(tier_in_use()), a, g, out, precision, threads);
}

}  // namespace hvpfast

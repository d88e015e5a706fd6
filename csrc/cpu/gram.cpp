// gram: out = beta out + alpha x'x for x (rows, I), upper triangle of products only, in panels.
//
// Two schedules. Few features: the rows are split over the threads, each with its own triangle of sums, added up in
// thread order at the end. Many features (a triangle of its own per thread would be large): rows are packed together,
// block after block, and each thread owns a part of the triangle. Both are deterministic for a thread count.
//
// What bounds it is the last-level cache: it gives a core a line every 15 to 20 cycles, whoever asks. So sums stay in L2
// while a part of the triangle is multiplied, and blocks fetch the panels that come after them.
#include "engine.hpp"
#include "kernels.hpp"
#include "rowwise.hpp"
#include "tiers.hpp"
#include "triangle.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

struct Blocking {
    int64_t depth;   // rows of a packed panel: a right panel stays in L1 while the left ones stream from L2
    int64_t blocks;  // panels of one strip of features that are packed before they are multiplied
    int64_t side;    // panels along the side of a part of the triangle, which stays in L2 with its operands
    bool share;      // threads share the triangle instead of the rows
    int threads;
};

// Measured on a 2-core AVX-512 + AMX machine, 2026-11-21.
template <class T>
Blocking choose_blocking(const Engine<T>& engine, int64_t rows, const Triangle& shape, int threads, bool unpacked) {
    Blocking chosen;
    const bool amx = engine.tier == Tier::amx;
    const int64_t features = shape.panels * engine.panel;
    chosen.depth = amx ? 16384 / engine.panel_bytes(engine.k_align) * engine.k_align : 160;
    chosen.share = threads > 1 && (features >= 1536 || rows < 64 * threads);
    if (rows * features * features < (int64_t(1) << 21)) threads = 1;
    if (!chosen.share) threads = int(least(threads, ceil_div(rows, 64)));
    chosen.threads = threads;
    const int64_t own = chosen.share ? rows : ceil_div(rows, threads);
    const int64_t blocks = ceil_div(own, chosen.depth);
    chosen.depth = ceil_div(ceil_div(own, blocks), engine.k_align) * engine.k_align;
    // Sums are fetched and written back once for all blocks packed together. On AMX, packing to L2 is worth more.
    const int64_t panel = engine.panel_bytes(chosen.depth);
    const int64_t bound = (int64_t(chosen.share ? 16 : 4) << 20) / (chosen.share ? 1 : threads);
    chosen.blocks = amx || unpacked ? 1 : least(blocks, most(1, bound / (shape.panels * panel)));
    const int64_t square = engine.panel * engine.panel * int64_t(sizeof(T));
    int64_t side = 1;
    while ((side + 1) * ((side + 1) * square + 2 * panel) + 2 * panel <= l2_bytes() * 11 / 20) ++side;
    chosen.side = ceil_div(shape.panels, ceil_div(shape.panels, side));
    return chosen;
}

// One call: its plan, and where a thread packs and multiplies.
template <class T>
struct Gram {
    const Engine<T>& engine;
    const Rows& x;
    bool ones;
    Triangle shape;
    Blocking plan;
    int64_t width;  // features, with the one of ones
    int64_t form;   // bytes of all panels of a block, as left or as right operands

    int64_t forms() const { return engine.one_form ? 1 : 2; }
    int64_t packed_bytes() const { return forms() * plan.blocks * form; }
    char* right_of(char* left) const { return engine.one_form ? left : left + plan.blocks * form; }

    // `low`: the sums of squared low halves, a row of panels * panel.
    void pack(int64_t row, int64_t rows, int64_t panel_first, int64_t panel_last, char* left, float* low, PackStats& stats) const {
        char* const right = right_of(left);
        for (int64_t at_row = 0; at_row < rows; at_row += plan.depth, left += form, row += plan.depth) {
            const int64_t k = least(plan.depth, rows - at_row), bytes = engine.panel_bytes(k);
            // AMX packs a group of rows at a time, across the features: long runs of x are read in order.
            const int64_t step = low != nullptr ? engine.k_align : k;
            for (int64_t k0 = 0; k0 < k; k0 += step)
                for (int64_t p = panel_first; p < panel_last; ++p) {
                    const int64_t at = p * bytes + (k0 == 0 ? 0 : engine.panel_bytes(k0));
                    if (low != nullptr) stats.low_squares = low + p * engine.panel;
                    engine.pack(x, row + k0, least(step, k - k0), p, ones, left + at, right + (at_row / plan.depth) * form + at, &stats);
                }
        }
    }

    // What the blocks (i0 .. i_last, j) fetch: half of them the right panel of the blocks to come, half a left one.
    Ahead ahead(const char* left, const char* right, int64_t bytes, bool last, int64_t i, int64_t i0, int64_t i_last, int64_t j, int64_t j0,
                int64_t j_last, T* at) const {
        const int64_t parts = (i_last - i0 + 1) / 2, lines = bytes / 64 / parts;
        Ahead found{i + 1 < i_last ? at + engine.panel * engine.panel : nullptr, nullptr, 0};
        if (packed_bytes() <= l2_bytes() / 2) return found;
        if ((i - i0) % 2 == 0 && j + 1 < j_last) found.lines = right + (j + 1) * bytes;
        else if (last) return found;
        else found.lines = (i - i0) % 2 ? left + form + (i0 + j - j0) * bytes : right + form + j0 * bytes;
        found.lines += (i - i0) / 2 * lines * 64;
        found.count = least(lines, 96);
        return found;
    }

    // Squares [first, last), counted part by part: c (= or +=) x'x over `rows` packed rows.
    void multiply(bool store, int64_t rows, int64_t first, int64_t last, char* left, T* c) const {
        const char* const right = right_of(left);
        const int64_t blocks = ceil_div(rows, plan.depth);
        int64_t before = 0;
        for (int64_t i0 = 0; i0 < shape.panels; i0 += plan.side)
            for (int64_t j0 = i0; j0 < shape.panels; j0 += plan.side) {
                const int64_t j_last = least(shape.panels, j0 + plan.side);
                int64_t square = before;
                for (int64_t block = 0; block < blocks; ++block) {
                    const int64_t k = least(plan.depth, rows - block * plan.depth), bytes = engine.panel_bytes(k);
                    const char *const a = left + block * form, *const b = right + block * form;
                    square = before;
                    for (int64_t j = j0; j < j_last; ++j) {
                        const int64_t i_last = least(i0 + plan.side, j + 1), nj = least(engine.panel, width - j * engine.panel);
                        for (int64_t i = i0; i < i_last; ++i, ++square) {
                            if (square < first || square >= last) continue;
                            T* const at = c + shape.at(i, j);
                            const Ahead soon = ahead(a, b, bytes, block + 1 == blocks, i, i0, i_last, j, j0, j_last, at);
                            engine.block(store && block == 0 ? Mode::store : Mode::add, a + i * bytes, b + j * bytes,
                                         least(engine.panel, width - i * engine.panel), nj, k, i == j, at, &soon);
                        }
                    }
                }
                before = square;
            }
    }
};

// False if a reduced-precision engine met values outside its range: out is untouched then.
template <class T>
bool gram_with(const Engine<T>& engine, const Rows& x, bool ones, double alpha, double beta, const Out& out, int threads) {
    const Triangle shape{engine.panel, ceil_div(out.rows, engine.panel)};
    // A few features that lie side by side need no packing, but for the last rows: a strip may not end past x.
    const bool unpacked = engine.direct != nullptr && out.rows <= engine.panel && !ones && x.outer == 1 && x.col_stride == 1 &&
                          x.inner_stride >= x.cols && x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
    const int64_t direct_rows = unpacked ? x.rows() - ceil_div(engine.panel, x.inner_stride) : 0;
    const Blocking plan = choose_blocking(engine, x.rows(), shape, threads, unpacked);
    const Gram<T> work{engine, x, ones, shape, plan, out.rows, shape.panels * engine.panel_bytes(plan.depth)};
    const bool amx = engine.tier == Tier::amx;
    const int64_t groups = plan.share ? 1 : plan.threads, features = shape.panels * engine.panel;

    Carver carver;
    const int64_t sums_at = carver.take(groups * shape.elements() * int64_t(sizeof(T)));
    const int64_t low_at = carver.take(amx ? groups * features * 4 : 0);
    const int64_t seen_at = carver.take(plan.threads * 4);
    const int64_t packed_at = carver.take(work.packed_bytes() * groups);
    const int64_t patch = shape.patch_elements(int64_t(sizeof(T))), patches_at = carver.take(plan.threads * patch * int64_t(sizeof(T)));
    char* const base = workspace(carver.used);
    T* const sums = reinterpret_cast<T*>(base + sums_at);
    float* const low = amx ? reinterpret_cast<float*>(base + low_at) : nullptr;
    uint32_t* const seen = reinterpret_cast<uint32_t*>(base + seen_at);
    if (amx)
        for (int64_t f = 0; f < groups * features; ++f) low[f] = 0;

    bool fits = true;
    parallel(plan.threads, [&](int index, int count) {
        // With fewer threads than asked for, one does the work of several.
        PackStats stats;
        engine.begin();
        const bool share = plan.share;
        const int64_t total = shape.squares(), pass = plan.depth * plan.blocks;
        for (int64_t group = share ? 0 : index; group < groups; group += share ? 1 : count) {
            const int64_t row_first = share ? 0 : x.rows() * group / groups, row_last = share ? x.rows() : x.rows() * (group + 1) / groups;
            T* const c = sums + group * shape.elements();
            char* const packed = base + packed_at + group * work.packed_bytes();
            for (int64_t row = row_first; row < row_last; row += pass) {
                const int64_t rows = least(pass, row_last - row);
                if (row + rows <= direct_rows) {
                    const Flat<T> here{static_cast<const T*>(x.data) + row * x.inner_stride, x.inner_stride, out.rows};
                    engine.direct(row == row_first ? Mode::store : Mode::add, here, here, rows, true, false, c);
                    continue;
                }
                if (share && row != row_first) barrier(count);  // the others have read what was packed before
                work.pack(row, rows, share ? shape.panels * index / count : 0, share ? shape.panels * (index + 1) / count : shape.panels,
                          packed, amx ? low + group * features : nullptr, stats);
                if (share) barrier(count);
                work.multiply(row == row_first, rows, share ? total * index / count : 0, share ? total * (index + 1) / count : total, packed, c);
            }
        }
        engine.end();
        seen[index] = stats.largest;
        barrier(count);
        uint32_t largest = 0;
        for (int t = 0; t < count; ++t) largest = seen[t] > largest ? seen[t] : largest;
        if (amx && !bf16_holds(largest)) {
            if (index == 0) fits = false;
            return;
        }
        mirror_squares<T>(shape, index, count, sums, groups, shape.elements(), low, groups, alpha, beta, out,
                          reinterpret_cast<T*>(base + patches_at) + index * patch);
    });
    return fits;
}

// Bytes that rows of values of `size` bytes reach from `data` on.
int64_t reach(int64_t outer, int64_t outer_stride, int64_t inner, int64_t inner_stride, int64_t cols, int64_t col_stride, int64_t size) {
    return ((outer - 1) * outer_stride + (inner - 1) * inner_stride + (cols - 1) * col_stride + 1) * size;
}

bool uses_amx(Dtype dtype, Precision precision) {
    return tier_in_use() == Tier::amx && (dtype == Dtype::bf16 || (dtype == Dtype::f32 && precision != Precision::ieee));
}

// Few rows, or few of both: the whole result is multiplied out, straight to its place. A mirror image costs more than as many
// products, and packing more than what it saves. Measured in float32; AMX is soon faster on bf16. Of a lower triangle no image
// is made: 0.2x to 0.9x the time of squares up to 64 rows in every tier, 256 to 4096 features.
bool few_rows(const Rows& x, const Out& out) {
    const int64_t rows = x.rows();
    const int64_t most_values = uses_amx(x.dtype, Precision::ieee) ? 2304 : out.rows <= 48 ? 8448 : 4224;
    return out.col_stride == 1 && (rows <= (out.lower ? 64 : 16) || (rows <= 1024 && out.rows <= 8) || rows * out.rows <= most_values);
}

template <class T>
void gram_few(const Engine<T>& engine, const Rowwise<T>& rowwise, const Rows& x, bool ones, double alpha, double beta, const Out& out,
              int threads) {
    const int64_t rows = x.rows(), width = out.rows, size = x.dtype == Dtype::f64 ? 8 : x.dtype == Dtype::f32 ? 4 : 2;
    Flat<T> flat{static_cast<const T*>(x.data), x.inner_stride, width};
    const bool in_place = size == sizeof(T) && x.col_stride == 1 && x.outer == 1 && !ones && width >= engine.few_least &&
                          apart(x, out);
    if (!in_place) {
        const int64_t pitch = ceil_div(width, engine.panel) * engine.panel;
        T* const held = reinterpret_cast<T*>(workspace(rows * pitch * int64_t(sizeof(T))));
        if (size == sizeof(T) && x.inner_stride == 1 && x.outer == 1)  // features after each other, each with its rows side by side
            for (int64_t f = 0; f < x.cols; f += engine.panel)
                engine.turn(flat.data + f * x.col_stride, x.col_stride, least(engine.panel, x.cols - f), rows, held + f, pitch);
        else
            for (int64_t r = 0; r < rows; ++r)
                rowwise.widen(static_cast<const char*>(x.data) + ((r / x.inner) * x.outer_stride + (r % x.inner) * x.inner_stride) * size,
                              x.dtype, x.col_stride, x.cols, held + r * pitch);
        if (ones)
            for (int64_t r = 0; r < rows; ++r) held[r * pitch + x.cols] = T(1);
        flat.data = held, flat.pitch = pitch;
    }
    T* const to = static_cast<T*>(out.data);
    const bool outer = rows == 1 && width >= 128 && alpha == 1 && beta == 0 && !out.lower;
    const bool upper = !out.lower && rows >= 8 && width <= 128 && beta == 0 && engine.few_square > 0;  // columns far apart share few sets of a cache
    if (width < (outer ? 256 : 512) && rows * width * width < (in_place ? int64_t(1) << 20 : int64_t(1) << 21)) threads = 1;
    const int64_t step = upper ? engine.few_square : engine.few_least, blocks = ceil_div(width, step);
    constexpr int64_t kDepth = 256;  // a long sum is a sum of partial sums
    parallel(int(least(threads, blocks)), [&](int index, int count) {
        const int64_t first = blocks * index / count * step, last = least(width, blocks * (index + 1) / count * step);
        if (outer) return rowwise.outer(flat.data + first, last - first, flat.data, width, to + first * out.row_stride, out.row_stride, false);
        if (upper && rows <= kDepth) {  // in turns: those that come first are longer
            for (int64_t at = index * step; at < width; at += count * step)
                engine.few(flat, rows, at, least(width, at + step), true, alpha, 0, to, out.row_stride);
            return;
        }
        const auto sums = [&](int64_t from, int64_t until, int64_t columns) {
            for (int64_t row = 0; row < rows; row += kDepth)
                engine.few(Flat<T>{flat.data + row * flat.pitch, flat.pitch, columns}, least(kDepth, rows - row), from, until, false, alpha,
                           row == 0 ? beta : 1, to, out.row_stride);
        };
        if (!out.lower) return sums(first, last, width);
        for (int64_t at = index * step; at < width; at += count * step) {  // up to the diagonal, and what lies past it is put back
            const int64_t until = least(width, at + step);
            T kept[kMostFew * kMostFew];
            for (int64_t r = at; r < until; ++r)
                for (int64_t c = r + 1; c < until; ++c) kept[(r - at) * step + c - at] = to[r * out.row_stride + c];
            sums(at, until, until);
            for (int64_t r = at; r < until; ++r)
                for (int64_t c = r + 1; c < until; ++c) to[r * out.row_stride + c] = kept[(r - at) * step + c - at];
        }
    });
}

template <class T>
void scale(const Out& out, double beta) {
    for (int64_t r = 0; r < out.rows; ++r)
        for (int64_t c = 0; c < (out.lower ? r + 1 : out.cols); ++c) {
            T& to = static_cast<T*>(out.data)[r * out.row_stride + c * out.col_stride];
            to = beta == 0 ? T(0) : T(beta) * to;
        }
}

}  // namespace

bool apart(const Rows& x, const Out& out) {
    const int64_t size = x.dtype == Dtype::f64 ? 8 : x.dtype == Dtype::f32 ? 4 : 2;
    const char *const from = static_cast<const char*>(x.data), *const to = static_cast<const char*>(out.data);
    return from + reach(x.outer, x.outer_stride, x.inner, x.inner_stride, x.cols, x.col_stride, size) <= to ||
           to + reach(1, 0, out.rows, out.row_stride, out.cols, out.col_stride, size == 8 ? 8 : 4) <= from;
}

// Measured on a 2-core AVX-512 + AMX machine, 2026-11-22.
const char* gram_slower(int64_t rows, int64_t features, bool turned, bool lower, Dtype dtype, Precision precision) {
    if (features == 0) return nullptr;
    if (tier_in_use() == Tier::portable) return "this CPU offers only the portable tier, which is slower than torch's own kernels";
    const bool half = dtype == Dtype::bf16 || dtype == Dtype::f16;
    const bool small = rows == 1 ? features <= 1024 : features <= 256 && rows * features * features <= (half ? 1 << 20 : 1 << 19);
    if (rows < 64 && features >= 96 && !small && !lower) return "fewer than 64 rows of many features: both write the result, and little else is to do";
    if (rows < 128 && features >= 192 && !lower && !uses_amx(dtype, precision))
        return "fewer than 128 rows of 192 features or more, in full precision: torch's product is as fast";
    if (features <= 4 && rows >= (dtype == Dtype::f32 || dtype == Dtype::f64 ? 16384 : 1024))
        return "at most 4 features: reading x is all there is, and torch's product does it at least as fast";
    if (turned && !half && (features <= 8 ? rows >= 1024 : features <= 16 && rows >= 4096))
        return "at most 16 features, the rows of each side by side: torch's product reads them in order, packing turns them first";
    return nullptr;
}

void gram(const Rows& x, bool ones, double alpha, double beta, const Out& out, Precision precision, int threads) {
    if (!threads_allowed || threads < 1) threads = 1;
    const bool wide = x.dtype == Dtype::f64;
    if (x.rows() == 0 || out.rows == 0) return wide ? scale<double>(out, beta) : scale<float>(out, beta);
    const Tier tier = tier_in_use();
    if (few_rows(x, out)) {
        if (wide) gram_few(engine_f64(tier), rowwise_f64(tier), x, ones, alpha, beta, out, threads);
        else gram_few(engine_f32(tier), rowwise_f32(tier), x, ones, alpha, beta, out, threads);
        return;
    }
    if (wide) {
        gram_with(engine_f64(tier), x, ones, alpha, beta, out, threads);
        return;
    }
    if (tier == Tier::amx) {
        // The split's error is stated as an average over many products; a few of them are no work in float32.
        const int64_t narrow = precision == Precision::automatic ? 48 : 32;
        const bool few = x.dtype == Dtype::f32 && (x.rows() < 32 || out.rows < narrow);
        if (precision == Precision::automatic) precision = Precision::bf16x3;
        const Engine<float>* engine = few ? nullptr : engine_amx(precision, x.dtype);
        if (engine != nullptr && gram_with(*engine, x, ones, alpha, beta, out, threads)) return;
    }
    gram_with(engine_f32(tier), x, ones, alpha, beta, out, threads);
}

}  // namespace hvpfast

// gram: out = beta out + alpha x'x for x (rows, I), upper triangle of products only, in panels.
//
// Two schedules. Few features: the rows are split over the threads, each with its own triangle of sums, added up in
// thread order at the end. Many features (a triangle of its own per thread would be large): rows are packed together,
// block after block, and each thread owns a part of the triangle. Both are deterministic for a thread count.
#include "engine.hpp"
#include "kernels.hpp"
#include "tiers.hpp"
#include "triangle.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

struct Blocking {
    int64_t depth;   // rows packed at a time
    int64_t side;    // panels along the side of a part of the triangle, which stays in L2 with its operands
    bool share;      // threads share the triangle instead of the rows
    int threads;
};

template <class T>
Blocking choose_blocking(const Engine<T>& engine, int64_t rows, const Triangle& shape, int threads) {
    Blocking chosen;
    const int64_t features = shape.panels * engine.panel;
    chosen.depth = 256;
    chosen.share = threads > 1 && features >= 1536;
    if (rows * features * features < (int64_t(1) << 21)) threads = 1;
    if (!chosen.share) threads = int(least(threads, ceil_div(rows, 64)));
    chosen.threads = threads;
    const int64_t own = chosen.share ? rows : ceil_div(rows, threads);
    const int64_t blocks = ceil_div(own, chosen.depth);
    chosen.depth = ceil_div(ceil_div(own, blocks), engine.k_align) * engine.k_align;
    const int64_t square = engine.panel * engine.panel * int64_t(sizeof(T)), panel = 2 * engine.panel_bytes(chosen.depth);
    chosen.side = 1;
    while ((chosen.side + 1) * ((chosen.side + 1) * square + panel) <= l2_bytes() * 7 / 10) ++chosen.side;
    return chosen;
}

// False if a reduced-precision engine met values outside its range: out is untouched then.
template <class T>
bool gram_with(const Engine<T>& engine, const Rows& x, bool ones, double alpha, double beta, const Out& out, int threads) {
    const Triangle shape{engine.panel, ceil_div(out.rows, engine.panel)};
    const Blocking plan = choose_blocking(engine, x.rows(), shape, threads);
    const bool amx = engine.tier == Tier::amx;
    const int64_t groups = plan.share ? 1 : plan.threads;
    const int64_t form = shape.panels * engine.panel_bytes(plan.depth), forms = engine.one_form ? 1 : 2;
    const int64_t features = shape.panels * engine.panel;

    Carver carver;
    const int64_t sums_at = carver.take(groups * shape.elements() * int64_t(sizeof(T)));
    const int64_t low_at = carver.take(amx ? groups * features * 4 : 0);
    const int64_t seen_at = carver.take(plan.threads * 4);
    const int64_t packed_at = carver.take(form * forms * (plan.share ? 2 : groups));
    char* const base = workspace(carver.used);
    T* const sums = reinterpret_cast<T*>(base + sums_at);
    float* const low = amx ? reinterpret_cast<float*>(base + low_at) : nullptr;
    uint32_t* const seen = reinterpret_cast<uint32_t*>(base + seen_at);
    char* const packed = base + packed_at;
    if (amx)
        for (int64_t f = 0; f < groups * features; ++f) low[f] = 0;

    // A few features that lie side by side need no packing, but for the last rows: a strip may not end past x.
    const bool unpacked = engine.direct != nullptr && out.rows <= engine.panel && !ones && x.outer == 1 && x.col_stride == 1 &&
                          x.inner_stride >= x.cols && x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
    const int64_t direct_rows = unpacked ? x.rows() - ceil_div(engine.panel, x.inner_stride) : 0;

    bool fits = true;
    parallel(plan.threads, [&](int index, int count) {
        // With fewer threads than asked for, one does the work of several.
        PackStats stats;
        engine.begin();
        const int64_t total = shape.squares();
        const int64_t mine_first = plan.share ? total * index / count : 0, mine_last = plan.share ? total * (index + 1) / count : total;
        for (int64_t group = plan.share ? 0 : index; group < groups; group += plan.share ? 1 : count) {
            const int64_t row_first = plan.share ? 0 : x.rows() * group / groups, row_last = plan.share ? x.rows() : x.rows() * (group + 1) / groups;
            T* const c = sums + group * shape.elements();
            int64_t parity = 0;
            for (int64_t row = row_first; row < row_last; row += plan.depth, parity ^= 1) {
                const int64_t k = least(plan.depth, row_last - row), bytes = engine.panel_bytes(k);
                const Mode mode = row == row_first ? Mode::store : Mode::add;
                if (row + k <= direct_rows) {
                    engine.direct(mode, static_cast<const T*>(x.data) + row * x.inner_stride, x.inner_stride, k, out.rows, c);
                    continue;
                }
                char* const a = packed + (plan.share ? parity : group) * form * forms;
                char* const b = engine.one_form ? a : a + form;
                const int64_t panel_first = plan.share ? shape.panels * index / count : 0;
                const int64_t panel_last = plan.share ? shape.panels * (index + 1) / count : shape.panels;
                // AMX packs a group of rows at a time, across the features: long runs of x are read in order.
                const int64_t step = amx ? engine.k_align : k;
                for (int64_t k0 = 0; k0 < k; k0 += step)
                    for (int64_t p = panel_first; p < panel_last; ++p) {
                        const int64_t at = p * bytes + (k0 == 0 ? 0 : engine.panel_bytes(k0));
                        if (amx) stats.low_squares = low + group * features + p * engine.panel;
                        engine.pack(x, row + k0, least(step, k - k0), p, ones, a + at, b + at, &stats);
                    }
                if (plan.share) barrier(count);
                int64_t square = 0;  // a thread owns squares [mine_first, mine_last), counted in this order
                for (int64_t i0 = 0; i0 < shape.panels; i0 += plan.side)
                    for (int64_t j0 = i0; j0 < shape.panels; j0 += plan.side)
                        for (int64_t j = j0; j < least(shape.panels, j0 + plan.side); ++j) {
                            const int64_t nj = least(engine.panel, out.cols - j * engine.panel);
                            const int64_t i_last = least(i0 + plan.side, j + 1);
                            for (int64_t i = i0; i < i_last; ++i, ++square) {
                                if (square < mine_first || square >= mine_last) continue;
                                const int64_t ni = least(engine.panel, out.rows - i * engine.panel);
                                T* const at = c + shape.at(i, j);
                                engine.block(mode, a + i * bytes, b + j * bytes, ni, nj, k, i == j, at,
                                             i + 1 < i_last ? at + engine.panel * engine.panel : nullptr);
                            }
                        }
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
        mirror_squares<T>(shape, total * index / count, total * (index + 1) / count, sums, groups, shape.elements(), low, groups,
                          alpha, beta, out);
    });
    return fits;
}

template <class T>
void scale(const Out& out, double beta) {
    for (int64_t r = 0; r < out.rows; ++r)
        for (int64_t c = 0; c < out.cols; ++c) {
            T& to = static_cast<T*>(out.data)[r * out.row_stride + c * out.col_stride];
            to = beta == 0 ? T(0) : T(beta) * to;
        }
}

}  // namespace

void gram(const Rows& x, bool ones, double alpha, double beta, const Out& out, Precision precision, int threads) {
    if (!threads_allowed || threads < 1) threads = 1;
    const bool wide = x.dtype == Dtype::f64;
    if (x.rows() == 0 || out.rows == 0) return wide ? scale<double>(out, beta) : scale<float>(out, beta);
    const Tier tier = tier_in_use();
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

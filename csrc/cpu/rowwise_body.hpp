// The row kernels, written once over a tier's vector policy P: see engine_body.hpp on how and why.

namespace {

// exp(x) for x <= 0 or NaN: x = n ln 2 + r, |r| <= ln 2 / 2, and exp(r) = 1 + r + r^2 q(r) with q the minimax
// polynomial (relative error 5e-11 and 5e-20 before rounding).
HVPFAST_INLINE const float* exp_terms(float) {
    static constexpr float terms[] = {0.00019790294423347439f, 0.00139447034837326711f, 0.00833349734709764957f,
                                      0.0416662943661103563f,  0.16666665866987448f,    0.500000006783916529f};
    return terms;
}

HVPFAST_INLINE const double* exp_terms(double) {
    static constexpr double terms[] = {
        2.08266065279509432e-9,  2.51120844852099478e-8, 2.75575822035353221e-7, 2.75572347279063167e-6, 0.0000248015869258115883, 0.000198412698965150087,
        0.00138888888891163122, 0.00833333333331698259, 0.0416666666666660921,  0.166666666666666835,  0.500000000000000004};
    return terms;
}

template <class P>
HVPFAST_INLINE typename P::V vector_exp(typename P::V x) {
    using T = typename P::T;
    using V = typename P::V;
    constexpr bool wide = sizeof(T) == 8;
    constexpr int count = wide ? 11 : 6;
    const T lowest = T(wide ? -746.0 : -104.0);  // exp is zero below
    const T inverse = T(1.4426950408889634), high = T(wide ? -0.6931471801362932 : -0.693115234375);
    const T low = T(wide ? -4.2365213658092841e-10 : -3.19461849453e-5);
    x = P::max(P::broadcast(&lowest), x);  // NaN stays: it is the second operand
    const V n = P::whole(P::mul(x, P::broadcast(&inverse)));
    V r = P::fma(n, P::broadcast(&high), x);
    r = P::fma(n, P::broadcast(&low), r);
    const T* terms = exp_terms(T(0));
    V q = P::broadcast(terms);
#pragma GCC unroll 12
    for (int term = 1; term < count; ++term) q = P::fma(q, r, P::broadcast(terms + term));
    const T one = T(1);
    return P::times_power(P::add(P::broadcast(&one), P::fma(P::mul(r, r), q, r)), n);
}

template <class P>
struct RowBody {
    using T = typename P::T;
    using V = typename P::V;
    static constexpr int64_t W = P::W;
    static constexpr int64_t kRun = 4096;  // values summed in T before they join the double

    HVPFAST_INLINE void store_part(T* to, V v, int64_t n) {
        alignas(64) T held[W];
        P::store(held, v);
        for (int64_t j = 0; j < n; ++j) to[j] = held[j];
    }

    static void widen(const void* from, Dtype dtype, int64_t stride, int64_t count, T* to) {
        const bool own = dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
        int64_t c = 0;
        if (stride == 1) {
            for (; c + W <= count; c += W) {
                if (own) P::store(to + c, P::load(static_cast<const T*>(from) + c));
                else if (dtype == Dtype::bf16) P::store(to + c, P::load_bf16(static_cast<const uint16_t*>(from) + c, int(W)));
                else P::store(to + c, P::load_f16(static_cast<const uint16_t*>(from) + c, int(W)));
            }
        }
        for (; c < count; ++c) {
            if (own) to[c] = static_cast<const T*>(from)[c * stride];
            else if (dtype == Dtype::bf16) to[c] = T(P::from_bf16(static_cast<const uint16_t*>(from)[c * stride]));
            else to[c] = T(P::from_f16(static_cast<const uint16_t*>(from)[c * stride]));
        }
    }

    // One row, from and to memory of its own: source(c) gives a vector, source.one(c) a value. Streamed rows need not
    // begin or end on a line: what shares a line with a neighbour is written as usual.
    template <class Source>
    HVPFAST_INLINE void write(const Source& source, int64_t cols, T* to, bool stream) {
        int64_t c = 0;
        if (stream && cols >= 4 * W) {
            constexpr int64_t line = 64 / int64_t(sizeof(T));
            const int64_t past = int64_t(reinterpret_cast<uintptr_t>(to) / sizeof(T)) % line;
            for (const int64_t head = past == 0 ? 0 : line - past; c < head; ++c) to[c] = source.one(c);
            for (; c + line <= cols; c += line)
#pragma GCC unroll 4
                for (int64_t j = 0; j < line; j += W) P::stream(to + c + j, source(c + j));
        } else {
            for (; c + W <= cols; c += W) P::store(to + c, source(c));
        }
        for (; c < cols; ++c) to[c] = source.one(c);
    }

    struct Scaled {
        const T* row;
        V factor;
        T scalar;
        HVPFAST_INLINE_MEMBER V operator()(int64_t c) const { return P::mul(factor, P::load(row + c)); }
        HVPFAST_INLINE_MEMBER T one(int64_t c) const { return scalar * row[c]; }
    };

    struct Unscaled {
        const T* row;
        HVPFAST_INLINE_MEMBER V operator()(int64_t c) const { return P::load(row + c); }
        HVPFAST_INLINE_MEMBER T one(int64_t c) const { return row[c]; }
    };

    static void outer(const T* column, int64_t rows, const T* row, int64_t cols, T* to, int64_t pitch, bool stream) {
        for (int64_t r = 0; r < rows; ++r, to += pitch) write(Scaled{row, P::broadcast(column + r), column[r]}, cols, to, stream);
    }

    static void copy(const T* from, int64_t from_pitch, int64_t rows, int64_t cols, T* to, int64_t pitch, bool stream) {
        for (int64_t r = 0; r < rows; ++r, from += from_pitch, to += pitch) write(Unscaled{from}, cols, to, stream);
    }

    static double exponentials(T* x, int64_t count) {
        T lowest;
        {
            const double zero = 0;
            lowest = T(-1 / zero);
        }
        for (int64_t c = count; c % W != 0; ++c) x[c] = lowest;
        V tops[4] = {P::broadcast(&lowest), P::broadcast(&lowest), P::broadcast(&lowest), P::broadcast(&lowest)};
        int64_t c = 0;
        for (; c + 4 * W <= count; c += 4 * W)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) tops[j] = P::max(P::load(x + c + j * W), tops[j]);
        for (; c < count; c += W) tops[0] = P::max(P::load(x + c), tops[0]);
        alignas(64) T held[W];
        P::store(held, P::max(P::max(tops[0], tops[1]), P::max(tops[2], tops[3])));
        T top = held[0];
        for (int64_t j = 1; j < W; ++j) top = held[j] > top ? held[j] : top;

        const V most = P::broadcast(&top);
        double sum = 0;
        for (int64_t start = 0; start < count; start += kRun) {
            const int64_t last = least(start + kRun, count);
            V sums[2] = {P::zero(), P::zero()};
            for (c = start; c + 2 * W <= last; c += 2 * W)
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j) {
                    const V e = vector_exp<P>(P::sub(P::load(x + c + j * W), most));
                    P::store(x + c + j * W, e);
                    sums[j] = P::add(sums[j], e);
                }
            for (; c < last; c += W) {
                const V e = vector_exp<P>(P::sub(P::load(x + c), most));
                P::store(x + c, e);
                sums[0] = P::add(sums[0], e);
            }
            sum += P::total(P::add(sums[0], sums[1]));
        }
        return sum;
    }

    static void project(const T* e, double sum, const T* v, int64_t count, T weight, T* to) {
        double dot = 0;
        for (int64_t start = 0; start < count; start += kRun) {
            const int64_t last = least(start + kRun, count);
            V sums[4] = {P::zero(), P::zero(), P::zero(), P::zero()};
            int64_t c = start;
            for (; c + 4 * W <= last; c += 4 * W)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) sums[j] = P::fma(P::load(e + c + j * W), P::load(v + c + j * W), sums[j]);
            for (; c + W <= last; c += W) sums[0] = P::fma(P::load(e + c), P::load(v + c), sums[0]);
            if (c < last) sums[1] = P::fma(P::load(e + c), P::load_part(v + c, int(last - c)), sums[1]);
            dot += P::total(P::add(P::add(sums[0], sums[1]), P::add(sums[2], sums[3])));
        }
        const T middle = T(dot / sum), share = T(1 / sum);
        const V mean = P::broadcast(&middle), factor = P::broadcast(&share), scale = P::broadcast(&weight);
        int64_t c = 0;
        for (; c + W <= count; c += W)
            P::store(to + c, P::mul(P::mul(P::mul(P::load(e + c), factor), P::sub(P::load(v + c), mean)), scale));
        if (c < count) {
            const V part = P::load_part(v + c, int(count - c));
            store_part(to + c, P::mul(P::mul(P::mul(P::load(e + c), factor), P::sub(part, mean)), scale), count - c);
        }
    }

    static double squares(const T* x, int64_t count) {
        V sum = P::zero();
        int64_t c = 0;
        for (; c + W <= count; c += W) sum = P::fma(P::load(x + c), P::load(x + c), sum);
        if (c < count) {
            const V part = P::load_part(x + c, int(count - c));
            sum = P::fma(part, part, sum);
        }
        return P::total(sum);
    }

    // Products of rows with rows, kSide by kSide at a time, summed over the features in vectors. `kTurns` squares side by side
    // use the same rows, of which `kBytes` at a time stay in L1 (1.94 against 1.74 times torch at 64 rows of 1152 and 256 with
    // what `totals` gains; 2-core AVX-512, 2026-11-22).
    static constexpr int64_t kSide = W * int64_t(sizeof(T)) == 64 ? 4 : 3;  // 16 and 9 sums fit the registers
    static constexpr int64_t kTurns = 2, kBytes = 2304;

    struct Sums {
        V of[kSide][kSide];
    };

    HVPFAST_INLINE void add_products(const T* const (&x)[kSide], const T* const (&y)[kSide], int64_t f, int n, Sums& sums) {
        V right[kSide];
#pragma GCC unroll 4
        for (int c = 0; c < kSide; ++c) right[c] = n == W ? P::load(y[c] + f) : P::load_part(y[c] + f, n);
#pragma GCC unroll 4
        for (int r = 0; r < kSide; ++r) {
            const V left = n == W ? P::load(x[r] + f) : P::load_part(x[r] + f, n);
#pragma GCC unroll 4
            for (int c = 0; c < kSide; ++c) sums.of[r][c] = P::fma(left, right[c], sums.of[r][c]);
        }
    }

    HVPFAST_INLINE Sums row_sums(const T* const (&x)[kSide], const T* const (&y)[kSide], int64_t cols) {
        Sums sums;
#pragma GCC unroll 4
        for (int r = 0; r < kSide; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < kSide; ++c) sums.of[r][c] = P::zero();
        int64_t f = 0;
        for (; f + W <= cols; f += W) add_products(x, y, f, int(W), sums);
        if (f < cols) add_products(x, y, f, int(cols - f), sums);
        return sums;
    }

    // A square of products: into `weights` (added to them unless `first`), or their sum with the weights.
    static double square_of_rows(const T* x, int64_t pitch, int64_t rows, int64_t i, int64_t j, int64_t cols, bool weigh, bool first, T* weights) {
        const T *left[kSide], *right[kSide];
#pragma GCC unroll 4
        for (int64_t r = 0; r < kSide; ++r) left[r] = x + least(i + r, rows - 1) * pitch, right[r] = x + least(j + r, rows - 1) * pitch;
        const Sums sums = row_sums(left, right, cols);
        if (!weigh && j + kSide <= rows) {
            V parts[kSide];
#pragma GCC unroll 4
            for (int c = 0; c < kSide; ++c) parts[c] = P::mul(P::broadcast(weights + c), sums.of[0][c]);
#pragma GCC unroll 4
            for (int r = 1; r < kSide; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < kSide; ++c) parts[c] = P::fma(P::broadcast(weights + r * kSide + c), sums.of[r][c], parts[c]);
#pragma GCC unroll 4
            for (int c = 1; c < kSide; ++c) parts[0] = P::add(parts[0], parts[c]);
            return P::total(parts[0]);
        }
        double sum = 0;
        alignas(64) T totals[kSide][kSide];
        if constexpr (kSide * kSide == W) {
            P::store(totals[0], P::totals(sums.of[0]));
        } else {
#pragma GCC unroll 4
            for (int r = 0; r < kSide; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < kSide; ++c) totals[r][c] = T(P::total(sums.of[r][c]));
        }
        const T twice = T(i == j ? 1 : 2);  // squares below the diagonal are not computed
        for (int64_t r = 0; r < least(kSide, rows - i); ++r)
            for (int64_t c = 0; c < least(kSide, rows - j); ++c) {
                T& weight = weights[r * kSide + c];
                const T value = totals[r][c];
                if (weigh) weight = (first ? T(0) : weight) + twice * value;
                else sum += double(weight) * double(value);
            }
        return sum;
    }

    static double row_products(const T* x, int64_t pitch, int64_t rows, int64_t cols, bool weigh, T* weights, const T* next) {
        const int64_t across = ceil_div(rows, kSide), lines = rows * cols * int64_t(sizeof(T)) / 64;
        const char *soon = reinterpret_cast<const char*>(next), *const past = soon + (next == nullptr ? 0 : 64 * lines);
        const int64_t run = weigh ? kRun : kBytes / int64_t(sizeof(T));
        const int64_t parts = ceil_div(cols, run), width = ceil_div(ceil_div(cols, parts), W) * W;
        const int64_t each = 64 * ceil_div(lines, parts * across * (across + 1) / 2);
        double sum = 0;
        for (int64_t start = 0; start < cols; start += width)
            for (int64_t i0 = 0; i0 < across; i0 += kTurns)
                for (int64_t j = i0; j < across; ++j)
                    for (int64_t i = i0; i <= least(j, i0 + kTurns - 1); ++i) {
                        for (const char* const last = past - soon < each ? past : soon + each; soon < last; soon += 64) P::fetch(soon);
                        T* const at = weights + (i * across - i * (i - 1) / 2 + j - i) * kSide * kSide;
                        sum += square_of_rows(x + start, pitch, rows, i * kSide, j * kSide, least(width, cols - start), weigh, start == 0, at);
                    }
        return sum;
    }

    static void flush() { P::flush(); }

    static Rowwise<T> kernels() { return {W, kSide, widen, outer, copy, flush, exponentials, project, squares, row_products}; }
};

}  // namespace

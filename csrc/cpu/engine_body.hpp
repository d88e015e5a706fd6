// The engine's vector tiers, written once over a vector policy P and included by one file a tier, under that file's
// instruction-set target. Everything here is in an unnamed namespace: code compiled for one target must not be
// merged by the linker with another's. For the same reason nothing here uses a std:: template.
//
// Packed form: strips of W = one vector of features, [strip][k][W]. The register tile is R rows x 3 vectors: R
// scalars of a left strip are broadcast against 3 strips at the right, so one packing serves both sides.

namespace {

template <class P>
struct Body {
    using T = typename P::T;
    using V = typename P::V;
    static constexpr int W = P::W, R = P::R;
    static constexpr int64_t kPanel = 3 * W;

    static int64_t strip_stride(int64_t k) { return k * W + 64 / int64_t(sizeof(T)); }  // one line off a power of two
    static int64_t panel_bytes(int64_t k) { return 3 * strip_stride(k) * int64_t(sizeof(T)); }

    struct Runs {
        int64_t count = 1, left = 0, right = 0;  // in elements
    };

    struct Lines {  // to fetch while a tile is summed; `sums`: also the sums that it joins
        const char* at = nullptr;
        int64_t count = 0;
        bool sums = false;
    };

    template <int NJ>
    HVPFAST_INLINE void step(const T* a, const T* b, int64_t stride, V (&acc)[R][NJ]) {
        V right[NJ];
#pragma GCC unroll 4
        for (int j = 0; j < NJ; ++j) right[j] = P::load(b + j * stride);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const V left = P::broadcast(a + r);
#pragma GCC unroll 4
            for (int j = 0; j < NJ; ++j) acc[r][j] = P::fma(left, right[j], acc[r][j]);
        }
    }

    // `pitch` and `left_pitch`: from one k to the next; `stride`: from one strip of b to the next.
    template <int NJ>
    HVPFAST_INLINE double tile(Mode mode, const T* a, const T* b, int64_t k, int64_t stride, T* c, const Runs& runs,
                               const Lines& lines = Lines(), int64_t left_pitch = W, int64_t pitch = W) {
        V acc[R][NJ];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < NJ; ++j) acc[r][j] = P::zero();
        for (int64_t run = 0; run < runs.count; ++run, a += runs.left, b += runs.right) {
            int64_t kk = 0;
            if (lines.sums) {
                for (; kk < least(k, R); ++kk) {
#pragma GCC unroll 4
                    for (int j = 0; j < NJ; ++j) P::fetch(c + kk * kPanel + j * W);
                    step(a + kk * left_pitch, b + kk * pitch, stride, acc);
                }
            }
            const int64_t past = least(k, kk + lines.count);
            for (const char* line = lines.at; kk < past; ++kk, line += 64) {
                P::fetch(line);
                step(a + kk * left_pitch, b + kk * pitch, stride, acc);
            }
            for (; kk < k; ++kk) step(a + kk * left_pitch, b + kk * pitch, stride, acc);
        }
        if (mode == Mode::sum_square) {
            V sum = P::zero();
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int j = 0; j < NJ; ++j) sum = P::fma(acc[r][j], acc[r][j], sum);
            return P::total(sum);
        }
        if (mode == Mode::dot) {
            V sum = P::zero();
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int j = 0; j < NJ; ++j) sum = P::fma(acc[r][j], P::load(c + r * kPanel + j * W), sum);
            return P::total(sum);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < NJ; ++j) {
                T* at = c + r * kPanel + j * W;
                V value = acc[r][j];
                if (mode == Mode::add) value = P::add(P::load(at), value);
                if (mode == Mode::add_square) value = P::fma(value, value, P::load(at));
                P::store(at, value);
            }
        return 0;
    }

    static double tiles(int nj, Mode mode, const T* a, const T* b, int64_t k, int64_t stride, T* c, const Runs& runs,
                        const Lines& lines = Lines()) {
        if (nj == 3) return tile<3>(mode, a, b, k, stride, c, runs, lines);
        if (nj == 2) return tile<2>(mode, a, b, k, stride, c, runs, lines);
        return tile<1>(mode, a, b, k, stride, c, runs, lines);
    }

    // Sum over the valid part of an edge tile only: a zero feature times an inf would give NaN.
    static double edge(Mode mode, const T* a, const T* b, int64_t rows, int64_t cols, int64_t k, int64_t stride,
                       const T* c) {
        alignas(64) T held[R * kPanel];
        tiles(int(ceil_div(cols, W)), Mode::store, a, b, k, stride, held, Runs());
        double sum = 0;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < cols; ++j) {
                const T value = held[r * kPanel + j];
                sum += double(value) * double(mode == Mode::dot ? c[r * kPanel + j] : value);
            }
        return sum;
    }

    static double block(Mode mode, const void* left, const void* right, int64_t ni, int64_t nj, int64_t k, bool upper,
                        T* c, const Ahead* ahead) {
        const T* a = static_cast<const T*>(left);
        const T* b = static_cast<const T*>(right);
        const int64_t stride = strip_stride(k);
        const bool sums = mode == Mode::sum_square || mode == Mode::dot;
        double sum = 0;
        Lines lines;
        lines.sums = ahead != nullptr && mode == Mode::add;
        if (ahead != nullptr) lines.at = ahead->lines, lines.count = ceil_div(ahead->count, ceil_div(ni, R));
        for (int64_t i = 0; i < ni; i += R, lines.at += 64 * lines.count) {
            const int64_t first = upper ? i / W : 0;  // strips left of the diagonal are not needed
            if (first * W >= nj) break;
            const T* rows = a + (i / W) * stride + i % W;
            const T* cols = b + first * stride;
            T* at = c == nullptr ? nullptr : c + i * kPanel + first * W;
            const int64_t wide = nj - first * W;
            if (sums && (i + R > ni || wide % W != 0))
                sum += edge(mode, rows, cols, least(R, ni - i), wide, k, stride, at);
            else
                sum += tiles(int(ceil_div(wide, W)), mode, rows, cols, k, stride, at, Runs(), lines);
        }
        return sum;
    }

    template <int NJ>
    static void direct_tile(Mode mode, const Flat<T>& a, const Flat<T>& b, int64_t i, int64_t j, int64_t k, T* c, const Lines& lines) {
        tile<NJ>(mode, a.data + i, b.data + j, k, W, c + i * kPanel + j, Runs(), lines, a.pitch, b.pitch);
    }

    static void direct(Mode mode, const Flat<T>& a, const Flat<T>& b, int64_t k, bool upper, bool next, T* c) {
        const int64_t of_a = k * a.pitch * int64_t(sizeof(T)) / 64, of_b = k * b.pitch * int64_t(sizeof(T)) / 64;
        Lines lines;
        lines.count = next ? ceil_div(of_a + of_b, ceil_div(a.features, R)) : 0;
        for (int64_t i = 0; i < a.features; i += R) {
            const int64_t first = upper ? i / W * W : 0, strips = ceil_div(b.features - first, W), line = i / R * lines.count;
            lines.at = line < of_a ? reinterpret_cast<const char*>(a.data + k * a.pitch) + 64 * line
                                   : reinterpret_cast<const char*>(b.data + k * b.pitch) + 64 * (line - of_a);
            if (strips == 3) direct_tile<3>(mode, a, b, i, first, k, c, lines);
            else if (strips == 2) direct_tile<2>(mode, a, b, i, first, k, c, lines);
            else direct_tile<1>(mode, a, b, i, first, k, c, lines);
        }
    }

    // Rows [i + skip, i + R) of out, columns [j, j + NJ W) as far as there are any.
    template <int NJ>
    static void few_tile(const Flat<T>& x, int64_t k, int64_t i, int64_t skip, int64_t rows, int64_t j, T alpha, T beta, T* out, int64_t pitch) {
        const int rest = int(least(W, x.features - j - (NJ - 1) * W));  // columns of the last strip
        V acc[R][NJ];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int s = 0; s < NJ; ++s) acc[r][s] = P::zero();
        const T* row = x.data;
        for (int64_t kk = 0; kk < k; ++kk, row += x.pitch) {
            V right[NJ];
#pragma GCC unroll 4
            for (int s = 0; s < NJ; ++s) right[s] = s + 1 < NJ ? P::load(row + j + s * W) : P::load_part(row + j + s * W, rest);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const V left = P::broadcast(row + i + r);
#pragma GCC unroll 4
                for (int s = 0; s < NJ; ++s) acc[r][s] = P::fma(left, right[s], acc[r][s]);
            }
        }
        T* to = out + (i + skip) * pitch + j;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            if (r < skip || r >= rows) continue;
#pragma GCC unroll 4
            for (int s = 0; s < NJ; ++s) {
                const int n = s + 1 < NJ ? W : rest;
                V value = acc[r][s];
                if (alpha != 1) value = P::mul(value, P::broadcast(&alpha));
                if (beta != 0) value = P::fma(P::broadcast(&beta), P::load_part(to + s * W, n), value);
                if (n == W) P::store(to + s * W, value);
                else P::store_part(to + s * W, value, n);
            }
            to += pitch;
        }
    }

    static void few(const Flat<T>& x, int64_t k, int64_t first, int64_t last, bool upper, double alpha, double beta, T* out, int64_t pitch) {
        for (int64_t at = first; at < last; at += R) {
            const int64_t i = most(0, least(at, x.features - R)), skip = at - i, rows = least(R, last - i);  // no row ends past x
            for (int64_t j = upper ? at / W * W : 0; j < x.features; j += 3 * W) {
                const int64_t strips = ceil_div(x.features - j, W);
                if (strips >= 3) few_tile<3>(x, k, i, skip, rows, j, T(alpha), T(beta), out, pitch);
                else if (strips == 2) few_tile<2>(x, k, i, skip, rows, j, T(alpha), T(beta), out, pitch);
                else few_tile<1>(x, k, i, skip, rows, j, T(alpha), T(beta), out, pitch);
            }
        }
        const int64_t right = (first / W + 1) * W;  // of the square on the diagonal
        if (upper && right < x.features)
            turn(out + first * pitch + right, pitch, last - first, x.features - right, out + right * pitch + first, pitch);
    }

    static void walk(const void* left, const void* right, int64_t left_row, int64_t right_row, int64_t ni, int64_t nj, const Walk& over,
                     T* c) {
        const T* a = static_cast<const T*>(left) + left_row * W;
        const T* b = static_cast<const T*>(right) + right_row * W;
        const int64_t stride = strip_stride(over.packed);
        Runs runs;
        runs.count = over.runs;
        runs.left = over.left_step * W;
        runs.right = over.right_step * W;
        for (int64_t i = 0; i < ni; i += R)
            tiles(int(ceil_div(nj, W)), Mode::add, a + (i / W) * stride + i % W, b, over.k, stride, c + i * kPanel, runs);
    }

    static void turn(const T* from, int64_t apart, int64_t lanes, int64_t count, T* to, int64_t pitch) {
        for (int64_t s = 0; s * W < lanes; ++s, from += W * apart, to += W) {
            const int n = int(least(W, lanes - s * W));
            int64_t r = 0;
            for (; r + W <= count && P::turn(from + r, apart, n, to + r * pitch, pitch); r += W) {
            }
            for (; r < count; ++r)
                for (int j = 0; j < W; ++j) to[r * pitch + j] = j < n ? from[j * apart + r] : T(0);
        }
    }

    HVPFAST_INLINE T element(const Rows& x, int64_t offset) {
        switch (x.dtype) {
            case Dtype::f32: return T(static_cast<const float*>(x.data)[offset]);
            case Dtype::f64: return T(static_cast<const double*>(x.data)[offset]);
            case Dtype::bf16: return T(P::from_bf16(static_cast<const uint16_t*>(x.data)[offset]));
            default: return T(P::from_f16(static_cast<const uint16_t*>(x.data)[offset]));
        }
    }

    HVPFAST_INLINE V loaded(const Rows& x, int64_t offset, int n) {  // n < W elements, zeros after them
        switch (x.dtype) {
            case Dtype::bf16: return P::load_bf16(static_cast<const uint16_t*>(x.data) + offset, n);
            case Dtype::f16: return P::load_f16(static_cast<const uint16_t*>(x.data) + offset, n);
            default: return P::load_part(static_cast<const T*>(x.data) + offset, n);
        }
    }

    static void pack(const Rows& x, int64_t row, int64_t k, int64_t p, bool ones, void* packed, void*, PackStats*) {
        constexpr int kGroup = 16;
        T* dst = static_cast<T*>(packed);
        const int64_t stride = strip_stride(k), first = p * kPanel;
        const int64_t cols = most(0, least(kPanel, x.cols - first));
        const int strips = int(ceil_div(least(kPanel, x.cols + ones - first), W));
        int64_t outer = x.inner ? row / x.inner : 0, inner = x.inner ? row % x.inner : 0;
        for (int64_t k0 = 0; k0 < k; k0 += kGroup) {
            const int group = int(least(kGroup, k - k0));
            int64_t offset[kGroup];
            bool run = x.inner_stride == 1;
            for (int r = 0; r < group; ++r) {
                offset[r] = outer * x.outer_stride + inner * x.inner_stride + first * x.col_stride;
                if (r && offset[r] != offset[r - 1] + 1) run = false;
                if (++inner == x.inner) inner = 0, ++outer;
            }
            for (int s = 0; s < strips; ++s) {
                T* at = dst + s * stride + k0 * W;
                const int n = int(most(0, least(W, cols - s * W)));
                if (x.col_stride == 1 && n > 0) {
                    const int64_t size = x.dtype == Dtype::f64 ? 8 : x.dtype == Dtype::f32 ? 4 : 2;
                    const char* const next = static_cast<const char*>(x.data) + (s * W + kGroup * x.inner_stride) * size;
                    for (int r = 0; r < group; ++r) P::fetch(next + offset[r] * size);
                    for (int r = 0; r < group; ++r) P::store(at + r * W, loaded(x, offset[r] + s * W, n));
                } else if (run && group == kGroup && x.dtype == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64) &&
                           W == kGroup && P::turn(static_cast<const T*>(x.data) + offset[0] + s * W * x.col_stride, x.col_stride, n, at, W)) {
                } else {
                    for (int r = 0; r < group; ++r)
                        for (int j = 0; j < W; ++j)
                            at[r * W + j] = j < n ? element(x, offset[r] + (s * W + j) * x.col_stride) : T(0);
                }
                const int64_t one = x.cols - first - s * W;  // the lane of the column of ones
                if (ones && one >= 0 && one < W)
                    for (int r = 0; r < group; ++r) at[r * W + one] = T(1);
            }
        }
    }

    static double row_squares(const Rows& x, int64_t row) {
        const int64_t offset = (row / x.inner) * x.outer_stride + (row % x.inner) * x.inner_stride;
        if (x.col_stride != 1) {
            double sum = 0;
            for (int64_t c = 0; c < x.cols; ++c) {
                const T value = element(x, offset + c * x.col_stride);
                sum += double(value) * double(value);
            }
            return sum;
        }
        constexpr int64_t kRun = 4096;  // features summed in T before they join the double
        double sum = 0;
        for (int64_t start = 0; start < x.cols; start += kRun) {
            const int64_t last = least(start + kRun, x.cols);
            V sums[4] = {P::zero(), P::zero(), P::zero(), P::zero()};
            int64_t c = start;
            for (; c + 4 * W <= last; c += 4 * W)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const V value = loaded(x, offset + c + j * W, W);
                    sums[j] = P::fma(value, value, sums[j]);
                }
            for (; c < last; c += W) {
                const V value = loaded(x, offset + c, int(least(W, last - c)));
                sums[0] = P::fma(value, value, sums[0]);
            }
            sum += P::total(P::add(P::add(sums[0], sums[1]), P::add(sums[2], sums[3])));
        }
        return sum;
    }

    static void nothing() {}

    static Engine<T> engine(Tier tier) {
        return {kPanel, 1, true, tier, panel_bytes, pack, nullptr, block, direct, few, R, sizeof(T) == 4 && W % R == 0 ? W : 0, walk, turn, row_squares, nothing, nothing};
    }
};

}  // namespace

// conv_gram's inner loops, written once over a tier's vector policy P: see engine_body.hpp on how and why.

namespace {

template <class P>
struct ConvBody {
    using T = typename P::T;
    using V = typename P::V;
    static constexpr int W = P::W;
    static constexpr int kSums = P::kRegisters >= 32 ? 24 : 12;  // sums held in registers

    static void turn(const T* base, const int64_t* offsets, int64_t used, int64_t count, T* to, int64_t pitch) {
        bool rows = used > 1;  // lanes that are neighbours need no transpose
        for (int64_t l = 1; rows && l < used; ++l) rows = offsets[l] == offsets[l - 1] + 1;
        if (rows) {
            for (int64_t r = 0; r < count; ++r) P::store(to + r * pitch, P::load_part(base + offsets[0] + r, int(used)));
            return;
        }
        for (int64_t r = 0; r < count; r += W) {
            const int64_t n = least(W, count - r);
            V held[W];
            if (n == W) {
#pragma GCC unroll 16
                for (int l = 0; l < W; ++l) held[l] = l < used ? P::load(base + offsets[l] + r) : P::zero();
            } else {
#pragma GCC unroll 16
                for (int l = 0; l < W; ++l) held[l] = l < used ? P::load_part(base + offsets[l] + r, int(n)) : P::zero();
            }
            P::transpose(held);
            T* at = to + r * pitch;
            if (n == W) {
#pragma GCC unroll 16
                for (int l = 0; l < W; ++l) P::store(at + l * pitch, held[l]);
            } else {
#pragma GCC unroll 16
                for (int l = 0; l < W; ++l)
                    if (l < n) P::store(at + l * pitch, held[l]);
            }
        }
    }

    static void weave(const T* const* sources, const int64_t* counts, int64_t nv, int64_t shift, int64_t nc, T alpha, T* out, int64_t pitch) {
        const V factor = P::broadcast(&alpha);
        for (int64_t c = 0; c < nc; c += W) {
            const T* const* from = sources;
            const int64_t n = least(W, nc - c);
            for (int64_t v0 = 0; v0 < nv; v0 += W) {
                const int64_t m = least(W, nv - v0);
                V held[W];
#pragma GCC unroll 16
                for (int v = 0; v < W; ++v) {
                    held[v] = P::zero();
                    if (v >= m) continue;
                    for (int64_t k = 0; k < counts[v0 + v]; ++k) held[v] = P::add(held[v], P::load(*from++ + shift + c));
                    held[v] = P::mul(held[v], factor);
                }
                P::transpose(held);
                T* to = out + c * pitch + v0;
                if (m == W && n == W) {
#pragma GCC unroll 16
                    for (int l = 0; l < W; ++l) P::store(to + l * pitch, held[l]);
                } else {
#pragma GCC unroll 16
                    for (int l = 0; l < W; ++l)
                        if (l < n) P::store_part(to + l * pitch, held[l], int(m));
                }
            }
        }
    }

    static void transpose(const T* from, int64_t from_pitch, T* to, int64_t to_pitch, int64_t rows, int64_t cols) {
        for (int64_t r = 0; r < rows; r += W)
            for (int64_t c = 0; c < cols; c += W) {
                V held[W];
#pragma GCC unroll 16
                for (int l = 0; l < W; ++l) held[l] = P::load(from + (r + l) * from_pitch + c);
                P::transpose(held);
#pragma GCC unroll 16
                for (int l = 0; l < W; ++l) P::store(to + (c + l) * to_pitch + r, held[l]);
            }
    }

    template <int LA, int RB>
    static void tile(const T* base, int64_t left0, int64_t left_pitch, const int64_t* right, const int64_t extent[4], const int64_t step[4], T* sums,
                     int64_t sums_pitch, const int64_t* at) {
        V acc[LA][RB];
#pragma GCC unroll 4
        for (int a = 0; a < LA; ++a)
#pragma GCC unroll 16
            for (int b = 0; b < RB; ++b) acc[a][b] = P::zero();
        for (int64_t n = 0; n < extent[0]; ++n)
            for (int64_t z = 0; z < extent[1]; ++z)
                for (int64_t y = 0; y < extent[2]; ++y) {
                    const T* from = base + n * step[0] + z * step[1] + y * step[2];
                    for (int64_t x = 0; x < extent[3]; ++x, from += step[3]) {
                        V left[LA];
#pragma GCC unroll 4
                        for (int a = 0; a < LA; ++a) left[a] = P::load(from + left0 + a * left_pitch);
#pragma GCC unroll 16
                        for (int b = 0; b < RB; ++b) {
                            const V value = P::load(from + right[b]);
#pragma GCC unroll 4
                            for (int a = 0; a < LA; ++a) acc[a][b] = P::fma(left[a], value, acc[a][b]);
                        }
                    }
                }
#pragma GCC unroll 4
        for (int a = 0; a < LA; ++a)
#pragma GCC unroll 16
            for (int b = 0; b < RB; ++b) {
                T* to = sums + a * sums_pitch + at[b];
                P::store(to, P::add(P::load(to), acc[a][b]));
            }
    }

    // As many right vectors at a time as there are registers for, then the rest.
    template <int LA>
    static void row(const T* base, int64_t left0, int64_t left_pitch, const int64_t* right, int64_t count, const int64_t extent[4], const int64_t step[4],
                    T* sums, int64_t sums_pitch, const int64_t* at) {
        constexpr int kMost = kSums / LA < 12 ? kSums / LA : 12;
        for (; count >= kMost; count -= kMost, right += kMost, at += kMost)
            tile<LA, kMost>(base, left0, left_pitch, right, extent, step, sums, sums_pitch, at);
        if constexpr (kMost > 6) {
            if (count >= 6) tile<LA, 6>(base, left0, left_pitch, right, extent, step, sums, sums_pitch, at), count -= 6, right += 6, at += 6;
        }
        if constexpr (kMost > 3) {
            if (count >= 3) tile<LA, 3>(base, left0, left_pitch, right, extent, step, sums, sums_pitch, at), count -= 3, right += 3, at += 3;
        }
        if (count == 2) tile<LA, 2>(base, left0, left_pitch, right, extent, step, sums, sums_pitch, at);
        if (count == 1) tile<LA, 1>(base, left0, left_pitch, right, extent, step, sums, sums_pitch, at);
    }

    static void products(const T* base, int64_t left_count, int64_t left_pitch, const int64_t* right, int64_t right_count,
                         const int64_t extent[4], const int64_t step[4], T* sums, int64_t sums_pitch, const int64_t* at) {
        int64_t left = 0;
        for (; left_count >= 4; left_count -= 4, left += 4 * left_pitch, sums += 4 * sums_pitch)
            row<4>(base, left, left_pitch, right, right_count, extent, step, sums, sums_pitch, at);
        if (left_count == 3) row<3>(base, left, left_pitch, right, right_count, extent, step, sums, sums_pitch, at);
        if (left_count == 2) row<2>(base, left, left_pitch, right, right_count, extent, step, sums, sums_pitch, at);
        if (left_count == 1) row<1>(base, left, left_pitch, right, right_count, extent, step, sums, sums_pitch, at);
    }

    static ConvKernels<T> kernels() { return {W, turn, weave, transpose, products}; }
};

}  // namespace

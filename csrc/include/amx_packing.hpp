// Packing of rows for the AMX engine: split into bf16 halves, paired, turned. Included under its target, inside its namespace.
#pragma once

#include "amx_split.hpp"

struct Cursor {  // walks the rows of x
    int64_t outer, inner;
    Cursor(const Rows& x, int64_t row) : outer(x.inner ? row / x.inner : 0), inner(x.inner ? row % x.inner : 0) {}
    int64_t next(const Rows& x) {
        const int64_t offset = outer * x.outer_stride + inner * x.inner_stride;
        if (++inner == x.inner) inner = 0, ++outer;
        return offset;
    }
};

HVPFAST_INLINE __m512 float_row(const Rows& x, int64_t offset, int n) {  // n features that lie side by side
    const __mmask16 valid = __mmask16((1u << n) - 1);
    if (x.dtype == Dtype::f32) return _mm512_maskz_loadu_ps(valid, static_cast<const float*>(x.data) + offset);
    const __m256i bits = _mm256_maskz_loadu_epi16(valid, static_cast<const uint16_t*>(x.data) + offset);
    if (x.dtype == Dtype::f16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

HVPFAST_INLINE float element(const Rows& x, int64_t offset) {
    if (x.dtype == Dtype::f32) return static_cast<const float*>(x.data)[offset];
    const uint16_t bits = static_cast<const uint16_t*>(x.data)[offset];
    return x.dtype == Dtype::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

// 32 rows (of which `rows` are there) of 16 features (n there) as float32, for layouts without adjacent features.
void gather(const Rows& x, const int64_t* offset, int rows, int64_t feature, int n, float (*held)[16]) {
    for (int half = 0; half < 32; half += 16) {
        bool run = x.dtype == Dtype::f32 && rows >= half + 16;
        for (int r = half + 1; run && r < half + 16; ++r) run = offset[r] == offset[r - 1] + 1;
        if (run) {
            const float* p = static_cast<const float*>(x.data) + offset[half] + feature * x.col_stride;
            __m512i lanes[16];
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j)
                lanes[j] = j < n ? _mm512_loadu_si512(p + j * x.col_stride) : _mm512_setzero_si512();
            transpose16(lanes);
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) _mm512_storeu_si512(held[half + r], lanes[r]);
        } else {
            for (int r = half; r < half + 16; ++r)
                for (int j = 0; j < 16; ++j)
                    held[r][j] = r < rows && j < n ? element(x, offset[r] + (feature + j) * x.col_stride) : 0.0f;
        }
    }
}

// Packs 32 rows that are neighbours in memory: a feature's values are a left tile's row as they stand, and the right
// tile is the transpose.
template <int PARTS>
void pack_across(const float* p, int64_t apart, int n, char* a, char* b, Split& seen, float* low_squares) {
    __m512i high[16], low[16];
    for (int j = 0; j < 16; ++j) {
        high[j] = low[j] = _mm512_setzero_si512();
        if (j >= n) continue;
        __m512 squares = _mm512_setzero_ps();
        split_run<PARTS>(p + j * apart, seen, high[j], low[j], squares);
        if (PARTS == 2 && low_squares != nullptr) low_squares[j] += _mm512_reduce_add_ps(squares);
    }
    for (int part = 0; part < PARTS; ++part) {
        __m512i* rows = part == 0 ? high : low;
        if (a != nullptr)
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) _mm512_storeu_si512(a + part * kTile + r * 64, rows[r]);
        if (b != nullptr) {
            transpose16(rows);
#pragma GCC unroll 16
            for (int r = 0; r < 16; ++r) _mm512_storeu_si512(b + part * kTile + r * 64, rows[r]);
        }
    }
}

// The same for bfloat16, 32 neighbours of which are a left tile's row of 64 bytes.
void pack_across_half(const uint16_t* p, int64_t apart, int n, char* a, char* b, Split& seen) {
    const __m512i top = _mm512_set1_epi32(int(0xffff0000u));
    __m512i rows[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
        rows[j] = j < n ? _mm512_loadu_si512(p + j * apart) : _mm512_setzero_si512();
        const __m512i odd = _mm512_and_si512(rows[j], top);
        seen.largest = _mm512_max_epu32(seen.largest, _mm512_slli_epi32(rows[j], 17));
        seen.largest = _mm512_max_epu32(seen.largest, _mm512_add_epi32(odd, odd));
    }
    if (a != nullptr)
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(a + r * 64, rows[r]);
    if (b != nullptr) {
        transpose16(rows);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(b + r * 64, rows[r]);
    }
}

// SQUARES: of the values' squares, for float32 features that lie side by side.
template <int PARTS, bool SQUARES>
void pack_rows(const Rows& x, int64_t row, int64_t k, int64_t p, bool ones, void* left, void* right, PackStats* stats) {
    const int64_t first = p * kPanel;
    const int64_t features = least(kPanel, x.cols + ones - first);
    const int strips = features > 16 ? 2 : 1;
    char* a = static_cast<char*>(left);
    char* b = static_cast<char*>(right);
    Split seen[2];
    for (Split& one : seen) one.largest = _mm512_setzero_si512(), one.low_squares = _mm512_setzero_ps();
    Cursor cursor(x, row);
    alignas(64) float held[32][16];
    const auto row_of = [&](int64_t at, int n) {
        const __m512 values = float_row(x, at, n);
        return SQUARES ? _mm512_mul_ps(values, values) : values;
    };
    for (int64_t k0 = 0; k0 < k; k0 += kGroup) {
        const int rows = int(least(kGroup, k - k0));
        int64_t offset[32];
        for (int r = 0; r < rows; ++r) offset[r] = cursor.next(x);
        const bool run = x.inner_stride == 1 && x.col_stride != 1 && rows == 32 && offset[31] - offset[0] == 31;
        const bool across = run && x.dtype == Dtype::f32, across_half = run && PARTS == 1 && x.dtype == Dtype::bf16;
        for (int s = 0; s < strips; ++s) {
            const int n = int(most(0, least(16, x.cols - first - 16 * s)));
            const int64_t feature = first + 16 * s;
            const int64_t at = ((k0 / kGroup) * 2 + s) * PARTS * kTile;
            if (across && !(ones && n < 16)) {
                pack_across<PARTS>(static_cast<const float*>(x.data) + offset[0] + feature * x.col_stride, x.col_stride, n,
                                   a == nullptr ? nullptr : a + at, b == nullptr ? nullptr : b + at, seen[s],
                                   stats == nullptr || stats->low_squares == nullptr ? nullptr : stats->low_squares + 16 * s);
                continue;
            }
            if (across_half && !(ones && n < 16)) {
                pack_across_half(static_cast<const uint16_t*>(x.data) + offset[0] + feature * x.col_stride, x.col_stride, n,
                                 a == nullptr ? nullptr : a + at, b == nullptr ? nullptr : b + at, seen[s]);
                continue;
            }
            __m512i high[16], low[16];
            if (x.dtype == Dtype::bf16 && x.col_stride == 1 && !(ones && n < 16)) {
                const uint16_t* base = static_cast<const uint16_t*>(x.data) + feature;
                const __mmask16 valid = __mmask16((1u << n) - 1);
#pragma GCC unroll 16
                for (int r = 0; r < 16; ++r) {
                    const __m256i none = _mm256_setzero_si256();
                    const __m256i even = 2 * r < rows ? _mm256_maskz_loadu_epi16(valid, base + offset[2 * r]) : none;
                    const __m256i odd = 2 * r + 1 < rows ? _mm256_maskz_loadu_epi16(valid, base + offset[2 * r + 1]) : none;
                    const __m512i low_half = _mm512_cvtepu16_epi32(even);
                    const __m512i high_half = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
                    seen[s].largest = _mm512_max_epu32(seen[s].largest, _mm512_slli_epi32(low_half, 17));
                    seen[s].largest = _mm512_max_epu32(seen[s].largest, _mm512_add_epi32(high_half, high_half));
                    high[r] = _mm512_or_si512(low_half, high_half);
                }
            } else if (x.col_stride == 1 && rows == 32 && n == 16) {
#pragma GCC unroll 16
                for (int r = 0; r < 16; ++r)
                    split_pair<PARTS>(row_of(offset[2 * r] + feature, 16), row_of(offset[2 * r + 1] + feature, 16), seen[s], high[r], low[r]);
            } else {
                if (x.col_stride == 1) {
                    for (int r = 0; r < 32; ++r)
                        _mm512_store_ps(held[r], r < rows ? row_of(offset[r] + feature, n) : _mm512_setzero_ps());
                } else {
                    gather(x, offset, rows, feature, n, held);
                }
                if (ones && n < 16 && x.cols - feature == n)
                    for (int r = 0; r < rows; ++r) held[r][n] = 1.0f;
#pragma GCC unroll 16
                for (int r = 0; r < 16; ++r)
                    split_pair<PARTS>(_mm512_load_ps(held[2 * r]), _mm512_load_ps(held[2 * r + 1]), seen[s], high[r], low[r]);
            }
            if (b != nullptr) {
#pragma GCC unroll 16
                for (int r = 0; r < 16; ++r) {
                    _mm512_storeu_si512(b + at + r * 64, high[r]);
                    if (PARTS == 2) _mm512_storeu_si512(b + at + kTile + r * 64, low[r]);
                }
            }
            if (a != nullptr) {
                transpose16(high);
#pragma GCC unroll 16
                for (int r = 0; r < 16; ++r) _mm512_storeu_si512(a + at + r * 64, high[r]);
                if (PARTS == 2) {
                    transpose16(low);
#pragma GCC unroll 16
                    for (int r = 0; r < 16; ++r) _mm512_storeu_si512(a + at + kTile + r * 64, low[r]);
                }
            }
        }
    }
    if (stats != nullptr) {
        const __m512i largest = _mm512_max_epu32(seen[0].largest, seen[1].largest);
        const uint32_t bits = uint32_t(_mm512_reduce_max_epu32(largest)) >> 1;
        stats->largest = bits > stats->largest ? bits : stats->largest;
        if (PARTS == 2 && stats->low_squares != nullptr)
            for (int s = 0; s < 2; ++s)
                _mm512_storeu_ps(stats->low_squares + 16 * s,
                                 _mm512_add_ps(_mm512_loadu_ps(stats->low_squares + 16 * s), seen[s].low_squares));
    }
    __asm__ volatile("" ::: "memory");
}

template <int PARTS>
void pack(const Rows& x, int64_t row, int64_t k, int64_t p, bool ones, void* left, void* right, PackStats* stats) {
    pack_rows<PARTS, false>(x, row, k, p, ones, left, right, stats);
}

template <int PARTS>
void pack_squares(const Rows& x, int64_t row, int64_t k, int64_t p, void* left, void* right, PackStats* stats) {
    pack_rows<PARTS, true>(x, row, k, p, false, left, right, stats);
}

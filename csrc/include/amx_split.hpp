// Splitting of float32 into two bf16 halves that a tile's lanes hold. Included under AMX's target, inside a namespace.
#pragma once

struct Split {
    __m512i largest;
    __m512 low_squares;
};

// Two rows of 16 float32 features -> hi and lo tile rows.
template <int PARTS>
HVPFAST_INLINE void split_pair(__m512 x0, __m512 x1, Split& seen, __m512i& high, __m512i& low) {
    const __m512i half = _mm512_set1_epi32(0x8000), top = _mm512_set1_epi32(int(0xffff0000u));
    const __m512i u0 = _mm512_castps_si512(x0), u1 = _mm512_castps_si512(x1);
    seen.largest = _mm512_max_epu32(seen.largest, _mm512_add_epi32(u0, u0));
    seen.largest = _mm512_max_epu32(seen.largest, _mm512_add_epi32(u1, u1));
    const __m512i h0 = _mm512_and_si512(_mm512_add_epi32(u0, half), top);
    const __m512i h1 = _mm512_and_si512(_mm512_add_epi32(u1, half), top);
    high = _mm512_or_si512(_mm512_srli_epi32(h0, 16), h1);
    if (PARTS == 2) {
        const __m512 r0 = _mm512_sub_ps(x0, _mm512_castsi512_ps(h0)), r1 = _mm512_sub_ps(x1, _mm512_castsi512_ps(h1));
        seen.low_squares = _mm512_fmadd_ps(r0, r0, seen.low_squares);
        seen.low_squares = _mm512_fmadd_ps(r1, r1, seen.low_squares);
        const __m512i l0 = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(r0), half), 16);
        const __m512i l1 = _mm512_add_epi32(_mm512_castps_si512(r1), half);
        low = _mm512_ternarylogic_epi32(l0, l1, top, 0xf8);  // l0 | (l1 & top)
    }
}

// 32 neighbouring float32 -> a left tile's row: 16 lanes of two bf16 each.
template <int PARTS>
HVPFAST_INLINE void split_run(const float* p, Split& seen, __m512i& high, __m512i& low, __m512& squares) {
    const __m512i half = _mm512_set1_epi32(0x8000), top = _mm512_set1_epi32(int(0xffff0000u));
    __m256i highs[2], lows[2];
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
        const __m512i bits = _mm512_loadu_si512(p + 16 * part);
        seen.largest = _mm512_max_epu32(seen.largest, _mm512_add_epi32(bits, bits));
        const __m512i rounded = _mm512_and_si512(_mm512_add_epi32(bits, half), top);
        highs[part] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
        if (PARTS == 2) {
            const __m512 rest = _mm512_sub_ps(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(rounded));
            squares = _mm512_fmadd_ps(rest, rest, squares);
            lows[part] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(rest), half), 16));
        }
    }
    high = _mm512_inserti64x4(_mm512_castsi256_si512(highs[0]), highs[1], 1);
    if (PARTS == 2) low = _mm512_inserti64x4(_mm512_castsi256_si512(lows[0]), lows[1], 1);
}

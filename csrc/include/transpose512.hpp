// 16 x 16 transpose of 32-bit lanes in AVX-512 registers. Included under the AVX-512 target, inside its namespace.
#pragma once

// rows[r] lane c -> rows[c] lane r. 64 shuffles: pairs, quads, then 128-bit quarters twice.
HVPFAST_INLINE void transpose16(__m512i rows[16]) {
    __m512i pair[16], quad[16];
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
        pair[r] = _mm512_unpacklo_epi32(rows[r], rows[r + 1]);
        pair[r + 1] = _mm512_unpackhi_epi32(rows[r], rows[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
        quad[r] = _mm512_unpacklo_epi64(pair[r], pair[r + 2]);
        quad[r + 1] = _mm512_unpackhi_epi64(pair[r], pair[r + 2]);
        quad[r + 2] = _mm512_unpacklo_epi64(pair[r + 1], pair[r + 3]);
        quad[r + 3] = _mm512_unpackhi_epi64(pair[r + 1], pair[r + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {  // quad[4 q + c]: rows 4q..4q+3 of columns c, 4 + c, 8 + c, 12 + c
        const __m512i low = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0xdd);
        const __m512i low2 = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0xdd);
        rows[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
        rows[8 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        rows[4 + c] = _mm512_shuffle_i32x4(high, high2, 0x88);
        rows[12 + c] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

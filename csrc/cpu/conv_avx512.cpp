// conv_gram's inner loops in AVX-512.
#include "conv_kernels.hpp"

#if HVPFAST_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics: bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace hvpfast {
#include "conv_body.hpp"
namespace {
#include "transpose512.hpp"

struct Float512 {
    using T = float;
    using V = __m512;
    static constexpr int W = 16, kRegisters = 32;
    HVPFAST_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
    HVPFAST_INLINE V zero() { return _mm512_setzero_ps(); }
    HVPFAST_INLINE V load(const T* p) { return _mm512_loadu_ps(p); }
    HVPFAST_INLINE V load_part(const T* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
    HVPFAST_INLINE V broadcast(const T* p) { return _mm512_set1_ps(*p); }
    HVPFAST_INLINE void store(T* p, V v) { _mm512_storeu_ps(p, v); }
    HVPFAST_INLINE void store_part(T* p, V v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
    HVPFAST_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    HVPFAST_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
    HVPFAST_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
    HVPFAST_INLINE void transpose(V rows[16]) {
        __m512i bits[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) bits[r] = _mm512_castps_si512(rows[r]);
        transpose16(bits);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) rows[r] = _mm512_castsi512_ps(bits[r]);
    }
};

struct Double512 {
    using T = double;
    using V = __m512d;
    static constexpr int W = 8, kRegisters = 32;
    HVPFAST_INLINE __mmask8 first(int n) { return __mmask8((1u << n) - 1); }
    HVPFAST_INLINE V zero() { return _mm512_setzero_pd(); }
    HVPFAST_INLINE V load(const T* p) { return _mm512_loadu_pd(p); }
    HVPFAST_INLINE V load_part(const T* p, int n) { return _mm512_maskz_loadu_pd(first(n), p); }
    HVPFAST_INLINE V broadcast(const T* p) { return _mm512_set1_pd(*p); }
    HVPFAST_INLINE void store(T* p, V v) { _mm512_storeu_pd(p, v); }
    HVPFAST_INLINE void store_part(T* p, V v, int n) { _mm512_mask_storeu_pd(p, first(n), v); }
    HVPFAST_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
    HVPFAST_INLINE V add(V a, V b) { return _mm512_add_pd(a, b); }
    HVPFAST_INLINE V mul(V a, V b) { return _mm512_mul_pd(a, b); }
    HVPFAST_INLINE void transpose(V r[8]) {
        V pair[8], quad[8];
#pragma GCC unroll 4
        for (int k = 0; k < 8; k += 2) {
            pair[k] = _mm512_unpacklo_pd(r[k], r[k + 1]);      // columns 0 2 4 6
            pair[k + 1] = _mm512_unpackhi_pd(r[k], r[k + 1]);  // columns 1 3 5 7
        }
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {  // quarters of rows 0-3, then of rows 4-7
            quad[k] = _mm512_shuffle_f64x2(pair[k], pair[k + 2], 0x88);      // columns k, k + 4
            quad[k + 2] = _mm512_shuffle_f64x2(pair[k], pair[k + 2], 0xdd);  // columns k + 2, k + 6
            quad[k + 4] = _mm512_shuffle_f64x2(pair[k + 4], pair[k + 6], 0x88);
            quad[k + 6] = _mm512_shuffle_f64x2(pair[k + 4], pair[k + 6], 0xdd);
        }
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            r[k] = _mm512_shuffle_f64x2(quad[k], quad[k + 4], 0x88);
            r[k + 4] = _mm512_shuffle_f64x2(quad[k], quad[k + 4], 0xdd);
        }
    }
};

}  // namespace

ConvKernels<float> conv_avx512_f32() { return ConvBody<Float512>::kernels(); }
ConvKernels<double> conv_avx512_f64() { return ConvBody<Double512>::kernels(); }

}  // namespace hvpfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

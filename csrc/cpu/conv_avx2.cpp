// conv_gram's inner loops in AVX2 with FMA.
#include "conv_kernels.hpp"

#if HVPFAST_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace hvpfast {
#include "conv_body.hpp"
namespace {

struct Float256 {
    using T = float;
    using V = __m256;
    static constexpr int W = 8, kRegisters = 16;
    HVPFAST_INLINE __m256i first(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    HVPFAST_INLINE V zero() { return _mm256_setzero_ps(); }
    HVPFAST_INLINE V load(const T* p) { return _mm256_loadu_ps(p); }
    HVPFAST_INLINE V load_part(const T* p, int n) { return _mm256_maskload_ps(p, first(n)); }
    HVPFAST_INLINE V broadcast(const T* p) { return _mm256_broadcast_ss(p); }
    HVPFAST_INLINE void store(T* p, V v) { _mm256_storeu_ps(p, v); }
    HVPFAST_INLINE void store_part(T* p, V v, int n) { _mm256_maskstore_ps(p, first(n), v); }
    HVPFAST_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    HVPFAST_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
    HVPFAST_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
    HVPFAST_INLINE void transpose(V r[8]) {
        V pair[8], quad[8];
#pragma GCC unroll 4
        for (int k = 0; k < 8; k += 2) {
            pair[k] = _mm256_unpacklo_ps(r[k], r[k + 1]);
            pair[k + 1] = _mm256_unpackhi_ps(r[k], r[k + 1]);
        }
#pragma GCC unroll 2
        for (int k = 0; k < 8; k += 4) {  // quad[k + c]: rows k..k+3 of columns c and c + 4
            quad[k] = _mm256_shuffle_ps(pair[k], pair[k + 2], 0x44);
            quad[k + 1] = _mm256_shuffle_ps(pair[k], pair[k + 2], 0xee);
            quad[k + 2] = _mm256_shuffle_ps(pair[k + 1], pair[k + 3], 0x44);
            quad[k + 3] = _mm256_shuffle_ps(pair[k + 1], pair[k + 3], 0xee);
        }
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            r[c] = _mm256_permute2f128_ps(quad[c], quad[c + 4], 0x20);
            r[c + 4] = _mm256_permute2f128_ps(quad[c], quad[c + 4], 0x31);
        }
    }
};

struct Double256 {
    using T = double;
    using V = __m256d;
    static constexpr int W = 4, kRegisters = 16;
    HVPFAST_INLINE __m256i first(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
    HVPFAST_INLINE V zero() { return _mm256_setzero_pd(); }
    HVPFAST_INLINE V load(const T* p) { return _mm256_loadu_pd(p); }
    HVPFAST_INLINE V load_part(const T* p, int n) { return _mm256_maskload_pd(p, first(n)); }
    HVPFAST_INLINE V broadcast(const T* p) { return _mm256_broadcast_sd(p); }
    HVPFAST_INLINE void store(T* p, V v) { _mm256_storeu_pd(p, v); }
    HVPFAST_INLINE void store_part(T* p, V v, int n) { _mm256_maskstore_pd(p, first(n), v); }
    HVPFAST_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
    HVPFAST_INLINE V add(V a, V b) { return _mm256_add_pd(a, b); }
    HVPFAST_INLINE V mul(V a, V b) { return _mm256_mul_pd(a, b); }
    HVPFAST_INLINE void transpose(V r[4]) {
        const V low = _mm256_unpacklo_pd(r[0], r[1]), high = _mm256_unpackhi_pd(r[0], r[1]);
        const V low2 = _mm256_unpacklo_pd(r[2], r[3]), high2 = _mm256_unpackhi_pd(r[2], r[3]);
        r[0] = _mm256_permute2f128_pd(low, low2, 0x20);
        r[1] = _mm256_permute2f128_pd(high, high2, 0x20);
        r[2] = _mm256_permute2f128_pd(low, low2, 0x31);
        r[3] = _mm256_permute2f128_pd(high, high2, 0x31);
    }
};

}  // namespace

ConvKernels<float> conv_avx2_f32() { return ConvBody<Float256>::kernels(); }
ConvKernels<double> conv_avx2_f64() { return ConvBody<Double256>::kernels(); }

}  // namespace hvpfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

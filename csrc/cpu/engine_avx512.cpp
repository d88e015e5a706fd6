// The engine in AVX-512: 8 x 48 register tiles in float32 (24 of 32 registers), 8 x 24 in float64.
#include "engine.hpp"
#include "rop.hpp"
#include "rowwise.hpp"
#include "scalar.hpp"
#include "summing.hpp"

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
#include "engine_body.hpp"
#include "rowwise_body.hpp"
#include "rop_body.hpp"
#include "summing_body.hpp"
#include "transpose512.hpp"
namespace {

struct Float512 {
    using T = float;
    using V = __m512;
    static constexpr int W = 16, R = 8;
    HVPFAST_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    HVPFAST_INLINE V zero() { return _mm512_setzero_ps(); }
    HVPFAST_INLINE V load(const T* p) { return _mm512_loadu_ps(p); }
    HVPFAST_INLINE V broadcast(const T* p) { return _mm512_set1_ps(*p); }
    HVPFAST_INLINE void store(T* p, V v) { _mm512_storeu_ps(p, v); }
    HVPFAST_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    HVPFAST_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
    HVPFAST_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
    HVPFAST_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
    HVPFAST_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
    HVPFAST_INLINE V where_negative(V x, V a, V b) { return _mm512_mask_mov_ps(b, _mm512_movepi32_mask(_mm512_castps_si512(x)), a); }
    HVPFAST_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where one is NaN
    HVPFAST_INLINE V whole(V v) { return _mm512_roundscale_ps(v, 8); }
    HVPFAST_INLINE V times_power(V v, V n) { return _mm512_scalef_ps(v, n); }
    HVPFAST_INLINE void stream(T* p, V v) { _mm512_stream_ps(p, v); }
    HVPFAST_INLINE void flush() { _mm_sfence(); }
    HVPFAST_INLINE double total(V v) {
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
        return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
    }
    // Sixteen vectors -> lane r: the sum of v[r]'s lanes.
    HVPFAST_INLINE V totals(const V* v) {
        __m512 quads[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
            const __m512 a = v[4 * q], b = v[4 * q + 1], c = v[4 * q + 2], d = v[4 * q + 3];
            const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // a b a b
            const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            quads[q] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));  // a b c d
        }
        const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88), _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
        const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88), _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
        return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    }
    HVPFAST_INLINE float from_bf16(uint16_t bits) { return bf16_to_float(bits); }
    HVPFAST_INLINE float from_f16(uint16_t bits) { return f16_to_float(bits); }
    HVPFAST_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
    HVPFAST_INLINE V load_part(const T* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
    HVPFAST_INLINE void store_part(T* p, V v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
    HVPFAST_INLINE V load_bf16(const uint16_t* p, int n) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    HVPFAST_INLINE V load_f16(const uint16_t* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
    // n arrays of 16 values, `stride` apart -> 16 rows of 16, `pitch` apart.
    HVPFAST_INLINE bool turn(const T* p, int64_t stride, int n, T* dst, int64_t pitch) {
        __m512i lanes[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j)
            lanes[j] = j < n ? _mm512_loadu_si512(p + j * stride) : _mm512_setzero_si512();
        transpose16(lanes);
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) _mm512_storeu_si512(dst + r * pitch, lanes[r]);
        return true;
    }
};

struct Double512 {
    using T = double;
    using V = __m512d;
    static constexpr int W = 8, R = 8;
    HVPFAST_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    HVPFAST_INLINE V zero() { return _mm512_setzero_pd(); }
    HVPFAST_INLINE V load(const T* p) { return _mm512_loadu_pd(p); }
    HVPFAST_INLINE V broadcast(const T* p) { return _mm512_set1_pd(*p); }
    HVPFAST_INLINE void store(T* p, V v) { _mm512_storeu_pd(p, v); }
    HVPFAST_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_pd(a, b, c); }
    HVPFAST_INLINE V add(V a, V b) { return _mm512_add_pd(a, b); }
    HVPFAST_INLINE V sub(V a, V b) { return _mm512_sub_pd(a, b); }
    HVPFAST_INLINE V mul(V a, V b) { return _mm512_mul_pd(a, b); }
    HVPFAST_INLINE V div(V a, V b) { return _mm512_div_pd(a, b); }
    HVPFAST_INLINE V where_negative(V x, V a, V b) { return _mm512_mask_mov_pd(b, _mm512_movepi64_mask(_mm512_castpd_si512(x)), a); }
    HVPFAST_INLINE V max(V a, V b) { return _mm512_max_pd(a, b); }
    HVPFAST_INLINE V whole(V v) { return _mm512_roundscale_pd(v, 8); }
    HVPFAST_INLINE V times_power(V v, V n) { return _mm512_scalef_pd(v, n); }
    HVPFAST_INLINE void stream(T* p, V v) { _mm512_stream_pd(p, v); }
    HVPFAST_INLINE void flush() { _mm_sfence(); }
    HVPFAST_INLINE double total(V v) { return _mm512_reduce_add_pd(v); }
    HVPFAST_INLINE float from_bf16(uint16_t bits) { return bf16_to_float(bits); }
    HVPFAST_INLINE float from_f16(uint16_t bits) { return f16_to_float(bits); }
    HVPFAST_INLINE V load_part(const T* p, int n) { return _mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p); }
    HVPFAST_INLINE void store_part(T* p, V v, int n) { _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), v); }
    HVPFAST_INLINE V load_bf16(const uint16_t*, int) { return zero(); }  // float64 engines read float64 only
    HVPFAST_INLINE V load_f16(const uint16_t*, int) { return zero(); }
    HVPFAST_INLINE bool turn(const T*, int64_t, int, T*, int64_t) { return false; }
};

}  // namespace

Engine<float> engine_avx512_f32() { return Body<Float512>::engine(Tier::avx512); }
Engine<double> engine_avx512_f64() { return Body<Double512>::engine(Tier::avx512); }
Rowwise<float> rowwise_avx512_f32() { return RowBody<Float512>::kernels(); }
Rowwise<double> rowwise_avx512_f64() { return RowBody<Double512>::kernels(); }
Rop<float> rop_avx512_f32() { return RopBody<Float512>::kernels(); }
Rop<double> rop_avx512_f64() { return RopBody<Double512>::kernels(); }
Summing<float> summing_avx512_f32() { return SummingBody<Float512>::kernels(); }
Summing<double> summing_avx512_f64() { return SummingBody<Double512>::kernels(); }

}  // namespace hvpfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

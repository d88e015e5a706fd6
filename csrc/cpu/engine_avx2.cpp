// The engine in AVX2 with FMA: 4 x 24 register tiles in float32 (12 of 16 registers), 4 x 12 in float64.
#include "engine.hpp"
#include "rop.hpp"
#include "rowwise.hpp"
#include "scalar.hpp"
#include "summing.hpp"

#if HVPFAST_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace hvpfast {
#include "engine_body.hpp"
#include "rowwise_body.hpp"
#include "rop_body.hpp"
#include "summing_body.hpp"
namespace {

struct Float256 {
    using T = float;
    using V = __m256;
    static constexpr int W = 8, R = 4;
    HVPFAST_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    HVPFAST_INLINE V zero() { return _mm256_setzero_ps(); }
    HVPFAST_INLINE V load(const T* p) { return _mm256_loadu_ps(p); }
    HVPFAST_INLINE V broadcast(const T* p) { return _mm256_broadcast_ss(p); }
    HVPFAST_INLINE void store(T* p, V v) { _mm256_storeu_ps(p, v); }
    HVPFAST_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    HVPFAST_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
    HVPFAST_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
    HVPFAST_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
    HVPFAST_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
    HVPFAST_INLINE V where_negative(V x, V a, V b) { return _mm256_blendv_ps(b, a, x); }
    HVPFAST_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where one is NaN
    HVPFAST_INLINE V whole(V v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    HVPFAST_INLINE V power(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
    HVPFAST_INLINE V times_power(V v, V n) {  // in two steps: 2^n may be below the smallest normal number
        const __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1);
        return mul(mul(v, power(half)), power(_mm256_sub_epi32(all, half)));
    }
    HVPFAST_INLINE void stream(T* p, V v) { _mm256_stream_ps(p, v); }
    HVPFAST_INLINE void flush() { _mm_sfence(); }
    HVPFAST_INLINE double total(V v) {
        const __m256d sum = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
        const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
        return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
    }
    HVPFAST_INLINE float from_bf16(uint16_t bits) { return bf16_to_float(bits); }
    HVPFAST_INLINE float from_f16(uint16_t bits) { return f16_to_float(bits); }
    HVPFAST_INLINE V load_part(const T* p, int n) {
        if (n >= W) return load(p);
        const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes));
    }
    HVPFAST_INLINE void store_part(T* p, V v, int n) {
        const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes), v);
    }
    HVPFAST_INLINE __m128i half_part(const uint16_t* p, int n) {
        if (n >= W) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        alignas(16) uint16_t held[8] = {};
        for (int j = 0; j < n; ++j) held[j] = p[j];
        return _mm_load_si128(reinterpret_cast<const __m128i*>(held));
    }
    HVPFAST_INLINE V load_bf16(const uint16_t* p, int n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_part(p, n)), 16));
    }
    HVPFAST_INLINE V load_f16(const uint16_t* p, int n) { return _mm256_cvtph_ps(half_part(p, n)); }
    HVPFAST_INLINE bool turn(const T*, int64_t, int, T*, int64_t) { return false; }
};

struct Double256 {
    using T = double;
    using V = __m256d;
    static constexpr int W = 4, R = 4;
    HVPFAST_INLINE void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    HVPFAST_INLINE V zero() { return _mm256_setzero_pd(); }
    HVPFAST_INLINE V load(const T* p) { return _mm256_loadu_pd(p); }
    HVPFAST_INLINE V broadcast(const T* p) { return _mm256_broadcast_sd(p); }
    HVPFAST_INLINE void store(T* p, V v) { _mm256_storeu_pd(p, v); }
    HVPFAST_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
    HVPFAST_INLINE V add(V a, V b) { return _mm256_add_pd(a, b); }
    HVPFAST_INLINE V sub(V a, V b) { return _mm256_sub_pd(a, b); }
    HVPFAST_INLINE V mul(V a, V b) { return _mm256_mul_pd(a, b); }
    HVPFAST_INLINE V div(V a, V b) { return _mm256_div_pd(a, b); }
    HVPFAST_INLINE V where_negative(V x, V a, V b) { return _mm256_blendv_pd(b, a, x); }
    HVPFAST_INLINE V max(V a, V b) { return _mm256_max_pd(a, b); }
    HVPFAST_INLINE V whole(V v) { return _mm256_round_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    HVPFAST_INLINE V power(__m128i n) {
        return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm_add_epi32(n, _mm_set1_epi32(1023))), 52));
    }
    HVPFAST_INLINE V times_power(V v, V n) {
        const __m128i all = _mm256_cvtpd_epi32(n), half = _mm_srai_epi32(all, 1);
        return mul(mul(v, power(half)), power(_mm_sub_epi32(all, half)));
    }
    HVPFAST_INLINE void stream(T* p, V v) { _mm256_stream_pd(p, v); }
    HVPFAST_INLINE void flush() { _mm_sfence(); }
    HVPFAST_INLINE double total(V v) {
        const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
        return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
    }
    HVPFAST_INLINE float from_bf16(uint16_t bits) { return bf16_to_float(bits); }
    HVPFAST_INLINE float from_f16(uint16_t bits) { return f16_to_float(bits); }
    HVPFAST_INLINE V load_part(const T* p, int n) {
        if (n >= W) return load(p);
        return _mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)));
    }
    HVPFAST_INLINE void store_part(T* p, V v, int n) {
        _mm256_maskstore_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)), v);
    }
    HVPFAST_INLINE V load_bf16(const uint16_t*, int) { return zero(); }  // float64 engines read float64 only
    HVPFAST_INLINE V load_f16(const uint16_t*, int) { return zero(); }
    HVPFAST_INLINE bool turn(const T*, int64_t, int, T*, int64_t) { return false; }
};

}  // namespace

Engine<float> engine_avx2_f32() { return Body<Float256>::engine(Tier::avx2); }
Engine<double> engine_avx2_f64() { return Body<Double256>::engine(Tier::avx2); }
Rowwise<float> rowwise_avx2_f32() { return RowBody<Float256>::kernels(); }
Rowwise<double> rowwise_avx2_f64() { return RowBody<Double256>::kernels(); }
Rop<float> rop_avx2_f32() { return RopBody<Float256>::kernels(); }
Rop<double> rop_avx2_f64() { return RopBody<Double256>::kernels(); }
Summing<float> summing_avx2_f32() { return SummingBody<Float256>::kernels(); }
Summing<double> summing_avx2_f64() { return SummingBody<Double256>::kernels(); }

}  // namespace hvpfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

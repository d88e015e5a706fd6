// The engine in plain C++, for CPUs and compilers without one of the tiers below.
#include <cmath>

#include "engine.hpp"
#include "rop.hpp"
#include "rowwise.hpp"
#include "scalar.hpp"
#include "summing.hpp"

namespace hvpfast {
#include "engine_body.hpp"
#include "rowwise_body.hpp"
#include "rop_body.hpp"
#include "summing_body.hpp"
namespace {

template <class Number>
struct Plain {
    using T = Number;
    static constexpr int W = 16 / sizeof(T), R = W;
    struct V {
        T lane[W];
    };
    HVPFAST_INLINE void fetch(const void*) {}
    HVPFAST_INLINE V zero() { return V{}; }
    HVPFAST_INLINE V load(const T* p) {
        V v;
        for (int j = 0; j < W; ++j) v.lane[j] = p[j];
        return v;
    }
    HVPFAST_INLINE V broadcast(const T* p) {
        V v;
        for (int j = 0; j < W; ++j) v.lane[j] = *p;
        return v;
    }
    HVPFAST_INLINE void store(T* p, V v) {
        for (int j = 0; j < W; ++j) p[j] = v.lane[j];
    }
    HVPFAST_INLINE V fma(V a, V b, V c) {
        for (int j = 0; j < W; ++j) c.lane[j] += a.lane[j] * b.lane[j];
        return c;
    }
    HVPFAST_INLINE V add(V a, V b) {
        for (int j = 0; j < W; ++j) a.lane[j] += b.lane[j];
        return a;
    }
    HVPFAST_INLINE V sub(V a, V b) {
        for (int j = 0; j < W; ++j) a.lane[j] -= b.lane[j];
        return a;
    }
    HVPFAST_INLINE V mul(V a, V b) {
        for (int j = 0; j < W; ++j) a.lane[j] *= b.lane[j];
        return a;
    }
    HVPFAST_INLINE V div(V a, V b) {
        for (int j = 0; j < W; ++j) a.lane[j] /= b.lane[j];
        return a;
    }
    HVPFAST_INLINE V where_negative(V x, V a, V b) {
        for (int j = 0; j < W; ++j) b.lane[j] = std::signbit(x.lane[j]) ? a.lane[j] : b.lane[j];
        return b;
    }
    HVPFAST_INLINE V max(V a, V b) {  // b where one is NaN
        for (int j = 0; j < W; ++j) b.lane[j] = a.lane[j] > b.lane[j] ? a.lane[j] : b.lane[j];
        return b;
    }
    HVPFAST_INLINE V whole(V v) {
        for (int j = 0; j < W; ++j) v.lane[j] = std::nearbyint(v.lane[j]);
        return v;
    }
    HVPFAST_INLINE V times_power(V v, V n) {
        for (int j = 0; j < W; ++j) v.lane[j] = n.lane[j] == n.lane[j] ? std::ldexp(v.lane[j], int(n.lane[j])) : n.lane[j];
        return v;
    }
    HVPFAST_INLINE void stream(T* p, V v) { store(p, v); }
    HVPFAST_INLINE void flush() {}
    HVPFAST_INLINE double total(V v) {
        double sum = 0;
        for (int j = 0; j < W; ++j) sum += double(v.lane[j]);
        return sum;
    }
    HVPFAST_INLINE float from_bf16(uint16_t bits) { return bf16_to_float(bits); }
    HVPFAST_INLINE float from_f16(uint16_t bits) { return f16_to_float(bits); }
    HVPFAST_INLINE V load_part(const T* p, int n) {
        V v{};
        for (int j = 0; j < n; ++j) v.lane[j] = p[j];
        return v;
    }
    HVPFAST_INLINE void store_part(T* p, V v, int n) {
        for (int j = 0; j < n; ++j) p[j] = v.lane[j];
    }
    HVPFAST_INLINE V load_bf16(const uint16_t* p, int n) {
        V v{};
        for (int j = 0; j < n; ++j) v.lane[j] = T(bf16_to_float(p[j]));
        return v;
    }
    HVPFAST_INLINE V load_f16(const uint16_t* p, int n) {
        V v{};
        for (int j = 0; j < n; ++j) v.lane[j] = T(f16_to_float(p[j]));
        return v;
    }
    HVPFAST_INLINE bool turn(const T*, int64_t, int, T*, int64_t) { return false; }
};

}  // namespace

Engine<float> engine_portable_f32() { return Body<Plain<float>>::engine(Tier::portable); }
Engine<double> engine_portable_f64() { return Body<Plain<double>>::engine(Tier::portable); }
Rowwise<float> rowwise_portable_f32() { return RowBody<Plain<float>>::kernels(); }
Rowwise<double> rowwise_portable_f64() { return RowBody<Plain<double>>::kernels(); }
Rop<float> rop_portable_f32() { return RopBody<Plain<float>>::kernels(); }
Rop<double> rop_portable_f64() { return RopBody<Plain<double>>::kernels(); }
Summing<float> summing_portable_f32() { return SummingBody<Plain<float>>::kernels(); }
Summing<double> summing_portable_f64() { return SummingBody<Plain<double>>::kernels(); }

}  // namespace hvpfast

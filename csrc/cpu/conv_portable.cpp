// conv_gram's inner loops in plain C++, and the choice among the tiers'.
#include "conv.hpp"
#include "scalar.hpp"

namespace hvpfast {
#include "conv_body.hpp"
namespace {

template <class Number>
struct Plain {
    using T = Number;
    static constexpr int W = 16 / sizeof(T), kRegisters = 16;
    struct V {
        T lane[W];
    };
    HVPFAST_INLINE V zero() { return V{}; }
    HVPFAST_INLINE V load(const T* p) { return load_part(p, W); }
    HVPFAST_INLINE V load_part(const T* p, int n) {
        V v{};
        for (int j = 0; j < n; ++j) v.lane[j] = p[j];
        return v;
    }
    HVPFAST_INLINE V broadcast(const T* p) {
        V v;
        for (int j = 0; j < W; ++j) v.lane[j] = *p;
        return v;
    }
    HVPFAST_INLINE void store(T* p, V v) { store_part(p, v, W); }
    HVPFAST_INLINE void store_part(T* p, V v, int n) {
        for (int j = 0; j < n; ++j) p[j] = v.lane[j];
    }
    HVPFAST_INLINE V fma(V a, V b, V c) {
        for (int j = 0; j < W; ++j) c.lane[j] += a.lane[j] * b.lane[j];
        return c;
    }
    HVPFAST_INLINE V add(V a, V b) {
        for (int j = 0; j < W; ++j) a.lane[j] += b.lane[j];
        return a;
    }
    HVPFAST_INLINE V mul(V a, V b) {
        for (int j = 0; j < W; ++j) a.lane[j] *= b.lane[j];
        return a;
    }
    HVPFAST_INLINE void transpose(V r[W]) {
        for (int i = 0; i < W; ++i)
            for (int j = i + 1; j < W; ++j) {
                const T value = r[i].lane[j];
                r[i].lane[j] = r[j].lane[i];
                r[j].lane[i] = value;
            }
    }
};

}  // namespace

#if HVPFAST_X86
ConvKernels<float> conv_avx2_f32();
ConvKernels<double> conv_avx2_f64();
ConvKernels<float> conv_avx512_f32();
ConvKernels<double> conv_avx512_f64();
#endif

const ConvKernels<float>& conv_kernels_f32(Tier tier) {
#if HVPFAST_X86
    static const ConvKernels<float> kernels[] = {ConvBody<Plain<float>>::kernels(), conv_avx2_f32(), conv_avx512_f32()};
    return kernels[tier == Tier::amx ? 2 : int(tier)];
#else
    static const ConvKernels<float> kernels = ConvBody<Plain<float>>::kernels();
    return (void)tier, kernels;
#endif
}

const ConvKernels<double>& conv_kernels_f64(Tier tier) {
#if HVPFAST_X86
    static const ConvKernels<double> kernels[] = {ConvBody<Plain<double>>::kernels(), conv_avx2_f64(), conv_avx512_f64()};
    return kernels[tier == Tier::amx ? 2 : int(tier)];
#else
    static const ConvKernels<double> kernels = ConvBody<Plain<double>>::kernels();
    return (void)tier, kernels;
#endif
}

template <class T>
void read_values(const Convolution& x, int64_t offset, int64_t step, int64_t count, T* to) {
    switch (x.dtype) {
        case Dtype::f32: {
            const float* from = static_cast<const float*>(x.data) + offset;
            for (int64_t q = 0; q < count; ++q) to[q] = T(from[q * step]);
            break;
        }
        case Dtype::f64: {
            const double* from = static_cast<const double*>(x.data) + offset;
            for (int64_t q = 0; q < count; ++q) to[q] = T(from[q * step]);
            break;
        }
        case Dtype::bf16: {
            const uint16_t* from = static_cast<const uint16_t*>(x.data) + offset;
            for (int64_t q = 0; q < count; ++q) to[q] = T(bf16_to_float(from[q * step]));
            break;
        }
        default: {
            const uint16_t* from = static_cast<const uint16_t*>(x.data) + offset;
            for (int64_t q = 0; q < count; ++q) to[q] = T(f16_to_float(from[q * step]));
        }
    }
}

template void read_values<float>(const Convolution&, int64_t, int64_t, int64_t, float*);
template void read_values<double>(const Convolution&, int64_t, int64_t, int64_t, double*);

}  // namespace hvpfast

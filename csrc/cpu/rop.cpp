// activation_rop and norm_rop: double backward of activations and norm layers, row by row in one pass over memory.
//
// Of a GELU torch makes some eleven passes over arrays of its size, of a LayerNorm some thirty; here each input is read once
// and each result written once. What norm_rop's weight gets is summed by each thread, and the threads' sums in their order.
#include "batch.hpp"
#include "kernels.hpp"
#include "rop.hpp"
#include "rowwise.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

constexpr int64_t kBlock = 1024;  // values that are widened at a time
constexpr int64_t kRows = 128;    // rows that one sum of the working type takes, before it joins the double
constexpr int64_t kShort = int64_t(1) << 14;

const Rop<float>& rop_of(Tier tier, float) {
#if HVPFAST_X86
    static const Rop<float> kernels[] = {rop_portable_f32(), rop_avx2_f32(), rop_avx512_f32()};
    return kernels[tier == Tier::amx ? 2 : int(tier)];
#else
    static const Rop<float> kernels = rop_portable_f32();
    return (void)tier, kernels;
#endif
}

const Rop<double>& rop_of(Tier tier, double) {
#if HVPFAST_X86
    static const Rop<double> kernels[] = {rop_portable_f64(), rop_avx2_f64(), rop_avx512_f64()};
    return kernels[tier == Tier::amx ? 2 : int(tier)];
#else
    static const Rop<double> kernels = rop_portable_f64();
    return (void)tier, kernels;
#endif
}

template <class T>
void rows_of(const Rowwise<T>& rowwise, const Rop<T>& rop, const NormRows& x, T* of_g, T* of_x, T* of_w, int threads) {
    const bool own = x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
    const int64_t features = x.features, bytes = features * int64_t(sizeof(T));
    if (x.rows * features < kShort) threads = 1;
    threads = int(most(1, least(threads, x.rows)));
    Carver carver;
    const int64_t vectors = carver.take(5 * bytes), shared = carver.used;
    const int64_t totals = carver.take(features * int64_t(sizeof(double))), block = carver.take(bytes), held = carver.take(3 * bytes);
    const int64_t each = carver.used - shared;
    char* const base = workspace(shared + each * threads);
    T* const zeros = reinterpret_cast<T*>(base + vectors);  // and weight, c_weight, c_bias
    for (int64_t i = 0; i < features; ++i) zeros[i] = T(0), zeros[features + i] = T(1);
    const auto vector = [&](const void* from, int64_t place, const T* otherwise) -> const T* {
        if (from == nullptr || own) return from == nullptr ? otherwise : static_cast<const T*>(from);
        rowwise.widen(from, x.dtype, 1, features, zeros + place * features);
        return zeros + place * features;
    };
    const T* const weight = vector(x.weight, 2, zeros + features);
    const T *const c_weight = vector(x.c_weight, 3, zeros), *const c_bias = vector(x.c_bias, 4, zeros);
    parallel(threads, [&](int index, int count) {
        char* const mine = base + index * each;  // the shared part comes first: places count it
        double* const total = reinterpret_cast<double*>(mine + totals);
        T *const part = reinterpret_cast<T*>(mine + block), *const wide = reinterpret_cast<T*>(mine + held);
        const auto read = [&](const void* from, int64_t row, int64_t place) -> const T* {
            if (from == nullptr) return zeros;
            const void* const at = at_element(from, x.dtype, row * features);
            if (own) return static_cast<const T*>(at);
            rowwise.widen(at, x.dtype, 1, features, wide + place * features);
            return wide + place * features;
        };
        const int64_t first = x.rows * index / count, last = x.rows * (index + 1) / count;
        if (of_w != nullptr)
            for (int64_t i = 0; i < features; ++i) total[i] = 0;
        for (int64_t start = first; start < last; start += kRows) {
            if (of_w != nullptr)
                for (int64_t i = 0; i < features; ++i) part[i] = 0;
            for (int64_t row = start; row < least(start + kRows, last); ++row) {
                const bool slopes = of_x != nullptr || of_w != nullptr;
                const NormRow<T> values{read(x.x, row, 0), slopes ? read(x.g, row, 1) : zeros, read(x.c, row, 2), weight, c_weight, c_bias,
                                        x.mean == nullptr ? T(0) : static_cast<const T*>(x.mean)[row], static_cast<const T*>(x.rstd)[row],
                                        features, x.mean != nullptr};
                rop.norm(values, of_g == nullptr ? nullptr : of_g + row * features, of_x == nullptr ? nullptr : of_x + row * features,
                         of_w == nullptr ? nullptr : part);
            }
            if (of_w != nullptr)
                for (int64_t i = 0; i < features; ++i) total[i] += double(part[i]);
        }
        if (of_w == nullptr) return;
        barrier(count);
        for (int64_t i = features * index / count; i < features * (index + 1) / count; ++i) {
            double sum = 0;
            for (int64_t other = 0; other < count; ++other) sum += reinterpret_cast<const double*>(base + other * each + totals)[i];
            of_w[i] = T(sum);
        }
    });
}

}  // namespace

void activation_rop(int kind, const void* x, const void* g, const void* c, Dtype dtype, int64_t count, float* of_g, float* of_x, int threads) {
    if (!threads_allowed || threads < 1 || count < kShort) threads = 1;
    const Rop<float>& rop = rop_of(tier_in_use(), 0.0f);
    const Rowwise<float>& rowwise = rowwise_f32(tier_in_use());
    const int64_t blocks = ceil_div(count, kBlock);
    parallel(threads, [&](int index, int workers) {
        const int64_t first = blocks * index / workers * kBlock, last = least(count, blocks * (index + 1) / workers * kBlock);
        alignas(64) float held[3][kBlock];
        for (int64_t start = first; start < last; start += kBlock) {
            const int64_t size = least(kBlock, last - start);
            const float* read[3] = {nullptr, nullptr, nullptr};
            for (int place = 0; place < 3; ++place) {
                if (place == 1 && of_x == nullptr) continue;
                const void* const at = at_element(place == 0 ? x : place == 1 ? g : c, dtype, start);
                if (dtype == Dtype::f32) read[place] = static_cast<const float*>(at);
                else rowwise.widen(at, dtype, 1, size, held[place]), read[place] = held[place];
            }
            rop.activate(Activation(kind), read[0], read[1], read[2], size, of_g == nullptr ? nullptr : of_g + start,
                         of_x == nullptr ? nullptr : of_x + start);
        }
    });
}

void norm_rop(const NormRows& x, void* of_g, void* of_x, void* of_w, int threads) {
    if (!threads_allowed || threads < 1) threads = 1;
    const Tier tier = tier_in_use();
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        T *const g = static_cast<T*>(of_g), *const slopes = static_cast<T*>(of_x), *const w = static_cast<T*>(of_w);
        if constexpr (sizeof(T) == 8) rows_of<T>(rowwise_f64(tier), rop_of(tier, zero), x, g, slopes, w, threads);
        else rows_of<T>(rowwise_f32(tier), rop_of(tier, zero), x, g, slopes, w, threads);
    };
    if (x.dtype == Dtype::f64) run(0.0);
    else run(0.0f);
}

}  // namespace hvpfast

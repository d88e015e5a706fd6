// norm_sample_stats: a norm layer's per-sample gradients of scale and shift, summed over positions, as norms and squares.
//
// One pass over x and g, a position (or a channel, where positions are side by side) in L1 at a time: torch's formulation writes
// the normalised input and its product with g. Threads share samples; each holds its own squares, added in their order.
#include <cmath>

#include "batch.hpp"
#include "rowwise.hpp"
#include "summing.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

constexpr int64_t kBlock = 128;  // positions that one sum of the working type takes, before it joins the sample's

template <class T>
struct Worker {
    const Rowwise<T>& rowwise;
    const Summing<T>& summing;
    const Batch &x, &g;
    const Normalised& how;
    bool own;
    T *scale, *shift, *block, *row, *slopes;  // of a sample: two sums, two of a block (one after the other), and two widened rows

    // `count` values from `data` at an offset as T: where they are, or widened into `held`.
    const T* read(const Batch& from, int64_t offset, int64_t stride, int64_t count, T* held) const {
        const void* const at = at_element(from.data, from.dtype, offset);
        if (own && stride == 1) return static_cast<const T*>(at);
        rowwise.widen(at, from.dtype, stride, count, held);
        return held;
    }

    T given(const void* values, int64_t batch, int64_t each, int64_t n, int64_t index, T otherwise) const {
        return values == nullptr ? otherwise : static_cast<const T*>(values)[n * batch + index * each];
    }

    void by_position(int64_t m, int64_t n) const {
        const int64_t features = g.features;
        for (int64_t start = 0; start < g.positions; start += kBlock) {
            for (int64_t i = 0; i < 2 * features; ++i) block[i] = 0;
            for (int64_t t = start; t < least(start + kBlock, g.positions); ++t) {
                const T* const slope = read(g, m * g.batch_stride + t * g.position_stride, g.feature_stride, features, slopes);
                const T* const input = read(x, n * x.batch_stride + t * x.position_stride, x.feature_stride, features, row);
                T mean = given(how.mean, how.mean_batch, how.mean_each, n, t, T(0));
                T rstd = given(how.rstd, how.rstd_batch, how.rstd_each, n, t, T(1));
                double sum = 0, squares = 0;
                if (how.kind == 1) {
                    summing.dots(nullptr, input, T(0), features, &sum, &squares);
                    mean = T(sum / double(features));
                }
                if (how.kind != 0) {
                    summing.dots(input, nullptr, mean, features, &sum, &squares);
                    rstd = T(1 / std::sqrt(squares / double(features) + how.eps));
                }
                summing.accumulate(input, slope, mean, rstd, features, block, block + features);
            }
            for (int64_t i = 0; i < features; ++i) scale[i] += block[i], shift[i] += block[features + i];
        }
    }

    void by_feature(int64_t m, int64_t n) const {
        for (int64_t i = 0; i < g.features; ++i) {
            const T* const slope = read(g, m * g.batch_stride + i * g.feature_stride, g.position_stride, g.positions, slopes);
            const T* const input = read(x, n * x.batch_stride + i * x.feature_stride, x.position_stride, x.positions, row);
            const T mean = given(how.mean, how.mean_batch, how.mean_each, n, i, T(0));
            double sum, dot;
            summing.dots(input, slope, mean, g.positions, &sum, &dot);
            scale[i] = T(dot * double(given(how.rstd, how.rstd_batch, how.rstd_each, n, i, T(1))));
            shift[i] = T(sum);
        }
    }
};

const Summing<float>& summing_of(Tier tier, float) {
#if HVPFAST_X86
    static const Summing<float> kernels[] = {summing_portable_f32(), summing_avx2_f32(), summing_avx512_f32()};
    return kernels[tier == Tier::amx ? 2 : int(tier)];
#else
    static const Summing<float> kernels = summing_portable_f32();
    return (void)tier, kernels;
#endif
}

const Summing<double>& summing_of(Tier tier, double) {
#if HVPFAST_X86
    static const Summing<double> kernels[] = {summing_portable_f64(), summing_avx2_f64(), summing_avx512_f64()};
    return kernels[tier == Tier::amx ? 2 : int(tier)];
#else
    static const Summing<double> kernels = summing_portable_f64();
    return (void)tier, kernels;
#endif
}

template <class T>
void stats(const Rowwise<T>& rowwise, const Summing<T>& summing, const Batch& x, const Batch& g, const Normalised& how, T* norms, T* squares, int threads) {
    const int64_t features = g.features, rows = how.by_feature ? g.positions : features;
    const int64_t wide = ceil_div(rows, rowwise.width) * rowwise.width;
    if (g.batch * g.positions * features < (int64_t(1) << 14)) threads = 1;
    threads = int(most(1, least(threads, g.batch)));
    Carver carver;
    const int64_t sums = carver.take(2 * features * int64_t(sizeof(double)));
    const int64_t of_sample = carver.take(2 * features * int64_t(sizeof(T))), of_block = carver.take(2 * features * int64_t(sizeof(T)));
    const int64_t held = carver.take(2 * wide * int64_t(sizeof(T))), each = carver.used;
    char* const base = workspace(each * threads);
    parallel(threads, [&](int index, int count) {
        char* const mine = base + index * each;
        double* const total = reinterpret_cast<double*>(mine + sums);
        T* const scale = reinterpret_cast<T*>(mine + of_sample);
        T* const row = reinterpret_cast<T*>(mine + held);
        const Worker<T> worker{rowwise, summing, x, g, how, g.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32),
                               scale, scale + features, reinterpret_cast<T*>(mine + of_block), row, row + wide};
        for (int64_t i = 0; i < 2 * features; ++i) total[i] = 0;
        for (int64_t m = g.batch * index / count; m < g.batch * (index + 1) / count; ++m) {
            const int64_t n = m % x.batch;
            for (int64_t i = 0; i < 2 * features; ++i) scale[i] = 0;
            if (how.by_feature) worker.by_feature(m, n);
            else worker.by_position(m, n);
            double sum, square;
            for (int64_t half = 0; half < 2; ++half) {
                summing.dots(scale + half * features, nullptr, T(0), features, &sum, &square);
                norms[half * g.batch + m] = T(square);
            }
            for (int64_t i = 0; i < 2 * features; ++i) total[i] += double(scale[i]) * double(scale[i]);
        }
        barrier(count);
        for (int64_t i = 2 * features * index / count; i < 2 * features * (index + 1) / count; ++i) {
            double sum = 0;
            for (int64_t other = 0; other < count; ++other) sum += reinterpret_cast<const double*>(base + other * each + sums)[i];
            squares[i] = T(sum);
        }
    });
}

}  // namespace

void norm_sample_stats(const Batch& x, const Batch& g, const Normalised& how, void* norms, void* squares, int threads) {
    if (!threads_allowed || threads < 1) threads = 1;
    const Tier tier = tier_in_use();
    if (g.dtype == Dtype::f64) stats(rowwise_f64(tier), summing_of(tier, 0.0), x, g, how, static_cast<double*>(norms), static_cast<double*>(squares), threads);
    else stats(rowwise_f32(tier), summing_of(tier, 0.0f), x, g, how, static_cast<float*>(norms), static_cast<float*>(squares), threads);
}

}  // namespace hvpfast

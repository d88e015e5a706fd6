// The sums along rows, written once over a tier's vector policy P: see engine_body.hpp on how and why.

namespace {

template <class P>
struct SummingBody {
    using T = typename P::T;
    using V = typename P::V;
    static constexpr int64_t W = P::W;
    static constexpr int64_t kRun = 4096;  // values summed in T before they join the double

    static void accumulate(const T* x, const T* g, T mean, T rstd, int64_t count, T* scale, T* shift) {
        const V middle = P::broadcast(&mean), factor = P::broadcast(&rstd);
        int64_t c = 0;
        for (; c + W <= count; c += W) {
            const V slope = P::load(g + c);
            P::store(shift + c, P::add(P::load(shift + c), slope));
            P::store(scale + c, P::fma(slope, P::mul(P::sub(P::load(x + c), middle), factor), P::load(scale + c)));
        }
        for (; c < count; ++c) {
            shift[c] += g[c];
            scale[c] += g[c] * ((x[c] - mean) * rstd);
        }
    }

    HVPFAST_INLINE void add_dots(const T* x, const T* g, V middle, int64_t c, V& sum, V& product) {
        const V away = x == nullptr ? P::zero() : P::sub(P::load(x + c), middle);
        const V slope = g == nullptr ? away : P::load(g + c);
        sum = P::add(sum, slope);
        product = P::fma(slope, away, product);
    }

    static void dots(const T* x, const T* g, T mean, int64_t count, double* sum, double* dot) {
        const V middle = P::broadcast(&mean);
        double total = 0, product = 0;
        for (int64_t start = 0; start < count; start += kRun) {
            const int64_t last = least(start + kRun, count);
            V sums[4] = {P::zero(), P::zero(), P::zero(), P::zero()}, products[4] = {P::zero(), P::zero(), P::zero(), P::zero()};
            int64_t c = start;
            for (; c + 4 * W <= last; c += 4 * W)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) add_dots(x, g, middle, c + j * W, sums[j], products[j]);
            for (; c + W <= last; c += W) add_dots(x, g, middle, c, sums[0], products[0]);
            total += P::total(P::add(P::add(sums[0], sums[1]), P::add(sums[2], sums[3])));
            product += P::total(P::add(P::add(products[0], products[1]), P::add(products[2], products[3])));
            for (; c < last; ++c) {
                const T away = x == nullptr ? T(0) : x[c] - mean, slope = g == nullptr ? away : g[c];
                total += slope;
                product += double(slope) * away;
            }
        }
        *sum = total, *dot = product;
    }

    static Summing<T> kernels() { return {W, accumulate, dots}; }
};

}  // namespace

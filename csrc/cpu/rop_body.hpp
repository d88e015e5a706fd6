// Double backward of activations and norm layers, written once over a tier's vector policy P: see engine_body.hpp on how and why.

namespace {

template <class P>
struct RopBody {
    using T = typename P::T;
    using V = typename P::V;
    static constexpr int64_t W = P::W;
    static constexpr int64_t kRun = 4096;  // values summed in T before they join the double

    HVPFAST_INLINE V all(double value) {
        const T held = T(value);
        return P::broadcast(&held);
    }

    HVPFAST_INLINE V within(V x, double bound) {  // NaN stays
        const V least = all(-bound), zero = P::zero();
        return P::sub(zero, P::max(least, P::sub(zero, P::max(least, x))));
    }

    struct Slopes {
        V first, second;
    };

    // Phi(-z) = exp(-z^2 / 2) t q(t), t = 1 / (1 + 0.27 z), for z in [0, 16]: relative error 3e-8 before rounding.
    HVPFAST_INLINE V tail(V z, V exponential) {
        static constexpr float terms[] = {0.029408782720565796f, -0.12868988513946533f, 0.17438653111457825f, -0.07450966536998749f, 0.11149585247039795f,
                                          0.0704902932047844f,   0.10220596939325333f,  0.10748834908008575f, 0.10772377997636795f};
        const V t = P::div(all(1), P::fma(z, all(0.27), all(1)));
        V q = all(terms[0]);
#pragma GCC unroll 8
        for (int term = 1; term < 9; ++term) q = P::fma(q, t, all(terms[term]));
        return P::mul(exponential, P::mul(t, q));
    }

    template <Activation kind>
    HVPFAST_INLINE Slopes slopes(V given) {
        const V zero = P::zero(), one = all(1), two = all(2), odd = P::sub(given, given);
        const V x = within(given, kind == Activation::gelu || kind == Activation::gelu_tanh ? 16 : 128);
        if constexpr (kind == Activation::gelu) {
            const V z = P::max(x, P::sub(zero, x)), square = P::mul(x, x);
            const V e = vector_exp<P>(P::mul(square, all(-0.5))), below = tail(z, e), density = P::mul(e, all(0.39894228040143268));
            const V whole = P::where_negative(x, below, P::sub(one, below));
            return {P::add(P::fma(x, density, whole), odd), P::fma(density, P::sub(two, square), odd)};
        }
        V u = x, du = one, ddu = zero;
        if constexpr (kind == Activation::gelu_tanh) {
            constexpr double factor = 1.5957691216057308, cube = 0.044715;
            const V square = P::mul(x, x);
            u = P::mul(x, P::fma(square, all(factor * cube), all(factor)));
            du = P::fma(square, all(3 * factor * cube), all(factor));
            ddu = P::mul(x, all(6 * factor * cube));
        }
        // s and 1 - s, the sigmoids of u and -u, and their product.
        const V e = vector_exp<P>(P::sub(zero, P::max(u, P::sub(zero, u))));
        const V r = P::div(one, P::add(one, e)), er = P::mul(e, r), product = P::mul(er, r);
        const V s = P::where_negative(u, er, r), rest = P::where_negative(u, r, er);
        if constexpr (kind == Activation::softplus) {
            const V left = P::sub(all(20), x);  // beyond 20, torch's is x
            return {P::add(P::where_negative(left, one, s), odd), P::add(P::where_negative(left, zero, product), odd)};
        }
        V value = s, rate = product, turn = P::sub(rest, s);  // phi = x value; rate = value', rate turn = value''
        if constexpr (kind == Activation::mish) {
            const V square = P::mul(e, e), twice = P::add(e, e);
            const V below = P::div(one, P::where_negative(x, P::add(two, P::add(twice, square)), P::add(one, P::add(twice, P::add(square, square)))));
            value = P::mul(P::where_negative(x, P::add(square, twice), P::add(one, twice)), below);
            const V part = P::mul(P::add(one, e), below);
            rate = P::mul(P::mul(P::mul(all(4), P::where_negative(x, one, square)), P::mul(part, part)), s);
            turn = P::sub(rest, P::mul(P::add(value, value), s));
        }
        if constexpr (kind == Activation::gelu_tanh) {
            const V first = P::fma(P::mul(x, rate), du, s);
            const V bend = P::mul(x, P::fma(P::mul(turn, du), du, ddu));
            return {P::add(first, odd), P::fma(rate, P::fma(two, du, bend), odd)};
        }
        return {P::add(P::fma(x, rate, value), odd), P::fma(rate, P::fma(x, turn, two), odd)};
    }

    template <Activation kind>
    static void activate_as(const T* x, const T* g, const T* c, int64_t count, T* of_g, T* of_x) {
        for (int64_t i = 0; i < count; i += W) {
            const int n = int(least(W, count - i));
            const bool full = n == W;
            const V along = full ? P::load(c + i) : P::load_part(c + i, n);
            const Slopes at = slopes<kind>(full ? P::load(x + i) : P::load_part(x + i, n));
            if (of_g != nullptr) put(of_g + i, P::mul(at.first, along), n);
            if (of_x != nullptr) put(of_x + i, P::mul(P::mul(at.second, full ? P::load(g + i) : P::load_part(g + i, n)), along), n);
        }
    }

    static void activate(Activation kind, const T* x, const T* g, const T* c, int64_t count, T* of_g, T* of_x) {
        switch (kind) {
            case Activation::gelu: return activate_as<Activation::gelu>(x, g, c, count, of_g, of_x);
            case Activation::gelu_tanh: return activate_as<Activation::gelu_tanh>(x, g, c, count, of_g, of_x);
            case Activation::silu: return activate_as<Activation::silu>(x, g, c, count, of_g, of_x);
            case Activation::mish: return activate_as<Activation::mish>(x, g, c, count, of_g, of_x);
            case Activation::softplus: return activate_as<Activation::softplus>(x, g, c, count, of_g, of_x);
        }
    }

    HVPFAST_INLINE void put(T* to, V v, int n) {
        if (n == W) P::store(to, v);
        else P::store_part(to, v, n);
    }

    static constexpr int kSums = 7;  // of c, c z, s, s z, c s, k g, k g z; s = w g, k = c_weight

    template <bool second>
    static void norm_as(const NormRow<T>& row, T* of_g, T* of_x, T* of_w) {
        const V mean = P::broadcast(&row.mean), rstd = P::broadcast(&row.rstd);
        double sums[kSums] = {};
        for (int64_t start = 0; start < row.count; start += kRun) {
            const int64_t last = least(start + kRun, row.count);
            V part[2][kSums];
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j)
#pragma GCC unroll 8
                for (int term = 0; term < kSums; ++term) part[j][term] = P::zero();
            int64_t i = start;
            for (; i + 2 * W <= last; i += 2 * W)
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j) add<second>(row, mean, rstd, i + j * W, int(W), part[j]);
            for (; i < last; i += W) add<second>(row, mean, rstd, i, int(least(W, last - i)), part[0]);
            for (int term = 0; term < (second ? kSums : 2); ++term) sums[term] += P::total(P::add(part[0][term], part[1][term]));
        }
        double m[kSums];
        for (int term = 0; term < kSums; ++term) m[term] = sums[term] / double(row.count);
        if (!row.centred) m[0] = m[2] = m[5] = 0;
        const double inverse = double(row.rstd);
        // of_x = rstd (h - <h> - <h z> z) - rstd^2 spread z, h = k g - rstd (s <c z> + c <s z>)
        const double spread = m[4] - m[0] * m[2] - m[1] * m[3];
        // Means of h as it will be, of rounded factors: then what a projection takes out of it is there to be taken.
        const T s_rounded = T(-inverse * m[1]), c_rounded = T(-inverse * m[3]);
        const double s_exact = double(s_rounded), c_exact = double(c_rounded);
        const double mean_h = m[5] + s_exact * m[2] + c_exact * m[0], along_h = m[6] + s_exact * m[3] + c_exact * m[1];
        const V of_c = all(m[0]), of_cz = all(m[1]), s_factor = P::broadcast(&s_rounded), c_factor = P::broadcast(&c_rounded);
        const V shift = all(mean_h), slope = all(along_h + inverse * spread);
        for (int64_t i = 0; i < row.count; i += W) {
            const int n = int(least(W, row.count - i));
            const auto at = [&](const T* from) { return n == W ? P::load(from + i) : P::load_part(from + i, n); };
            const V z = P::mul(P::sub(at(row.x), mean), rstd), c = at(row.c), weight = at(row.weight), k = at(row.c_weight);
            if (of_g != nullptr || of_w != nullptr) {
                const V pushed = P::mul(rstd, P::sub(P::sub(c, of_c), P::mul(z, of_cz)));
                if (of_g != nullptr) put(of_g + i, P::fma(pushed, weight, P::fma(k, z, at(row.c_bias))), n);
                if (of_w != nullptr) put(of_w + i, P::fma(at(row.g), pushed, at(of_w)), n);
            }
            if (second) {
                const V g = at(row.g);
                const V h = P::fma(k, g, P::fma(P::mul(weight, g), s_factor, P::mul(c, c_factor)));
                put(of_x + i, P::mul(rstd, P::sub(P::sub(h, shift), P::mul(z, slope))), n);
            }
        }
    }

    template <bool second>
    HVPFAST_INLINE void add(const NormRow<T>& row, V mean, V rstd, int64_t i, int n, V (&sums)[kSums]) {
        const auto at = [&](const T* from) { return n == W ? P::load(from + i) : P::load_part(from + i, n); };
        const V z = P::mul(P::sub(at(row.x), mean), rstd), c = at(row.c);  // past the end z is masked by what it meets
        sums[0] = P::add(sums[0], c);
        sums[1] = P::fma(c, z, sums[1]);
        if (second) {
            const V g = at(row.g), s = P::mul(g, at(row.weight)), kg = P::mul(g, at(row.c_weight));
            sums[2] = P::add(sums[2], s);
            sums[3] = P::fma(s, z, sums[3]);
            sums[4] = P::fma(c, s, sums[4]);
            sums[5] = P::add(sums[5], kg);
            sums[6] = P::fma(kg, z, sums[6]);
        }
    }

    static void norm(const NormRow<T>& row, T* of_g, T* of_x, T* of_w) {
        if (of_x == nullptr) norm_as<false>(row, of_g, of_x, of_w);
        else norm_as<true>(row, of_g, of_x, of_w);
    }

    static Rop<T> kernels() {
        if constexpr (sizeof(T) == 4) return {W, activate, norm};
        else return {W, nullptr, norm};
    }
};

}  // namespace

// conv_gram for kernel size 1 and few channels a group, whose pixels lie side by side: dot products of channels as they
// stand in memory, a vector lane for every pixel of a vector. Nothing is packed.
#include <cstring>

#include "conv.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

constexpr int64_t kTail = 256;  // values of a channel

}  // namespace

template <class T>
bool conv_has_pixels(const Convolution& x, int64_t lanes) {
    if (x.dtype != (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32) || x.offsets() != 1 || x.pixels() < 2 * lanes || x.channels > 16) return false;
    int64_t step = 1;
    for (int d = 2; d >= 0; --d) {
        if (x.before[d] != 0 || (x.stride[d] != 1 && x.size[d] > 1) || (x.size[d] > 1 && x.space_stride[d] != step)) return false;
        step *= x.size[d];
    }
    return true;
}

template <class T>
void conv_by_pixels(const Convolution& x, double alpha, double beta, const GroupsOut& out, int threads) {
    const ConvKernels<T>& kernels = conv_kernels(tier_in_use(), T());
    const int64_t lanes = kernels.lanes, cc = x.channels, pixels = x.pixels(), whole = pixels / lanes, square = cc * cc;
    const bool by_group = x.groups >= 2 * threads;
    if (x.batch * x.groups * cc * cc * pixels < (int64_t(1) << 17)) threads = 1;
    const int64_t each = (by_group ? 1 : x.groups) * square * lanes;
    T* const sums = reinterpret_cast<T*>(workspace(each * threads * int64_t(sizeof(T))));
    // Pixels at a time: all channels of a group stay in L1.
    const int64_t run = most(1, (int64_t(16) << 10) / int64_t(sizeof(T)) / (cc * lanes));

    parallel(threads, [&](int thread, int count) {
        int64_t right[16], at[16];
        alignas(64) T tail[16 * kTail];  // what is left of samples whose pixels do not fill vectors, sample after sample
        for (int64_t c = 0; c < cc; ++c) at[c] = c * lanes;
        const auto multiply = [&](const T* from, int64_t channel_stride, const int64_t extent[4], const int64_t step[4], T* to) {
            for (int64_t a = 0; a < cc; a += 4) {  // on and right of the diagonal
                for (int64_t c = a; c < cc; ++c) right[c] = (c - a) * channel_stride;
                kernels.products(from + a * channel_stride, least(4, cc - a), channel_stride, right + a, cc - a, extent, step, to + a * cc * lanes,
                                 cc * lanes, at + a);
            }
        };
        const auto add = [&](int64_t group, int64_t first, int64_t last, T* to) {
            const T* const base = static_cast<const T*>(x.data) + group * cc * x.channel_stride;
            for (int64_t v = 0; v < whole; v += run) {
                const int64_t extent[4] = {1, 1, last - first, least(run, whole - v)}, step[4] = {0, 0, x.batch_stride, lanes};
                multiply(base + first * x.batch_stride + v * lanes, x.channel_stride, extent, step, to);
            }
            const int64_t rest = pixels - whole * lanes;
            int64_t filled = 0;
            for (int64_t n = first; n < last && rest > 0; ++n) {
                for (int64_t c = 0; c < cc; ++c)
                    std::memcpy(tail + c * kTail + filled, base + n * x.batch_stride + c * x.channel_stride + whole * lanes, size_t(rest) * sizeof(T));
                filled += rest;
                if (n + 1 < last && filled + rest <= kTail) continue;
                const int64_t vectors = ceil_div(filled, lanes), extent[4] = {1, 1, 1, vectors}, step[4] = {0, 0, 0, lanes};
                for (int64_t c = 0; c < cc; ++c)
                    for (int64_t q = filled; q < vectors * lanes; ++q) tail[c * kTail + q] = 0;
                multiply(tail, kTail, extent, step, to);
                filled = 0;
            }
        };
        const auto write = [&](int64_t group, const T* from) {
            T* const base = static_cast<T*>(out.data) + group * out.group_stride;
            for (int64_t a = 0; a < cc; ++a)
                for (int64_t b = a; b < cc; ++b) {
                    T sums_of_lanes[16];
                    std::memcpy(sums_of_lanes, from + (a * cc + b) * lanes, size_t(lanes) * sizeof(T));
                    for (int64_t half = lanes / 2; half > 0; half /= 2)
                        for (int64_t l = 0; l < half; ++l) sums_of_lanes[l] += sums_of_lanes[l + half];
                    const T value = T(alpha * double(sums_of_lanes[0]));
                    T& upper = base[a * out.row_stride + b * out.col_stride];
                    T& lower = base[b * out.row_stride + a * out.col_stride];
                    upper = beta == 0 ? value : T(beta) * upper + value;
                    if (a != b) lower = beta == 0 ? value : T(beta) * lower + value;
                }
        };
        if (by_group) {
            T* const own = sums + thread * each;
            for (int64_t group = x.groups * thread / count; group < x.groups * (thread + 1) / count; ++group) {
                std::memset(own, 0, size_t(each) * sizeof(T));
                add(group, 0, x.batch, own);
                write(group, own);
            }
            return;
        }
        for (int worker = thread; worker < threads; worker += count) {  // with fewer threads, one does the work of several
            T* const own = sums + worker * each;
            std::memset(own, 0, size_t(each) * sizeof(T));
            for (int64_t group = 0; group < x.groups; ++group)
                add(group, x.batch * worker / threads, x.batch * (worker + 1) / threads, own + group * square * lanes);
        }
        barrier(count);
        if (thread != 0) return;
        for (int other = 1; other < threads; ++other)
            for (int64_t e = 0; e < each; ++e) sums[e] += sums[other * each + e];
        for (int64_t group = 0; group < x.groups; ++group) write(group, sums + group * square * lanes);
    });
}

template bool conv_has_pixels<float>(const Convolution&, int64_t);
template bool conv_has_pixels<double>(const Convolution&, int64_t);
template void conv_by_pixels<float>(const Convolution&, double, double, const GroupsOut&, int);
template void conv_by_pixels<double>(const Convolution&, double, double, const GroupsOut&, int);

}  // namespace hvpfast

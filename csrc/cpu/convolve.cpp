// convolve: a convolution, or its transpose, as correlations (correlation.hpp).
#include <algorithm>
#include <vector>

#include "correlation.hpp"
#include "engine.hpp"
#include "kernels.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

#if HVPFAST_AMX
constexpr int64_t kGroups = 36;  // of 32 channels at one tap that a block of sums takes at a time: 144 KiB of weights

constexpr int64_t kPacked = int64_t(4) << 20;  // bytes of weights packed at a time: results of more are gone through again

// Lanes of a packed plane: the last tile may begin in the last row; pairs must not all lie in one set of a cache.
int64_t padded(int64_t lanes) {
    const int64_t whole = ceil_div(lanes, 16) * 16 + 16;
    return whole % 128 == 0 ? whole + 16 : whole;
}

struct Planned : CorrelationPlan {
    std::vector<int64_t> remainders_of, bytes_of;

    explicit Planned(const Correlation& one) {
        by = one;
        taps = by.taps[0] * by.taps[1], groups = ceil_div(by.channels, 32), panels = ceil_div(by.features, 32);
        rows = by.stride[1] == 1 && by.positions[1] % 16 == 0;
        columns = rows ? 1 : by.taps[1];
        pitch = by.positions[1] + (rows ? (by.taps[1] - 1) * by.dilation[1] : 0);
        reach = (by.taps[0] - 1) * by.dilation[0] / by.stride[0];
        std::vector<int64_t> seen;
        for (int64_t i = 0; i < by.taps[0]; ++i) {
            const int64_t rest = i * by.dilation[0] % by.stride[0];
            const auto found = std::find(seen.begin(), seen.end(), rest);
            remainders_of.push_back(found - seen.begin());
            if (found == seen.end()) seen.push_back(rest);
        }
        remainders = int64_t(seen.size());
        together = least(groups, most(1, kGroups / taps));
        packed = least(groups, most(1, kPacked / (panels * taps * 4096 * together)) * together);
        panel_bytes = packed * taps * 4096;
        const int64_t aim = l2_bytes() * 2 / 5, values = together * columns * remainders * 32 * 4;
        band = by.positions[0];
        if (values * padded((band + reach) * pitch) > aim) {
            const int64_t left = most(1, aim / (values * pitch) - reach);
            band = least(band, rows ? left : ceil_div(left, 16) * 16);  // whole tiles
        }
        plane = padded((band + reach) * pitch);
        copy_bytes = plane * 32 * 4;  // 16 channel pairs, hi and lo
        group_bytes = columns * remainders * copy_bytes;
        images = band < by.positions[0] ? 1 : most(1, aim / (together * group_bytes));
        for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t i = tap / by.taps[1], j = tap % by.taps[1];
            const int64_t copy = (rows ? 0 : j) * remainders + remainders_of[size_t(i)];
            bytes_of.push_back(copy * copy_bytes + 4 * (i * by.dilation[0] / by.stride[0] * pitch + (rows ? j * by.dilation[1] : 0)));
        }
        remainder = remainders_of.data(), at = bytes_of.data();
    }
    Planned(const Planned&) = delete;
};

bool correlate(const Correlation& by, int threads) {
    const Planned plan(by);
    const Engine<float>& engine = *engine_amx(Precision::bf16x3, Dtype::f32);
    const int parts = int(least(threads, by.batch)), splits = int(least(threads / parts, plan.panels)), all = parts * splits;
    const int64_t whole = plan.panels * plan.panel_bytes, each = ceil_div(plan.images * plan.together * plan.group_bytes + 64, 4096) * 4096;
    char* const base = workspace(whole + each * all);
    std::vector<CorrelationSeen> seen(size_t(all), CorrelationSeen{});
    parallel(all, [&](int index, int count) {
        engine.begin();
        for (int64_t group = 0; group < plan.groups; group += plan.packed) {
            const int64_t end = least(plan.groups, group + plan.packed);
            for (int64_t panel = index; panel < plan.panels; panel += count)
                pack_weights(plan, panel, group, end, base + panel * plan.panel_bytes, seen[size_t(index)]);
            barrier(count);
            for (int job = index; job < all; job += count) {  // OpenMP may give fewer threads
                const int64_t part = job / splits, split = job % splits;
                correlate_share(plan, by.batch * part / parts, by.batch * (part + 1) / parts, plan.panels * split / splits, plan.panels * (split + 1) / splits,
                                group, end, base, base + whole + index * each, seen[size_t(index)]);
            }
            barrier(count);
        }
        engine.end();
    });
    CorrelationSeen largest;
    for (const CorrelationSeen& one : seen) {
        largest.weights = std::max(largest.weights, one.weights);
        largest.images = std::max(largest.images, one.images);
    }
    return bf16_holds(largest.weights, largest.images);
}
#else
bool correlate(const Correlation&, int) { return false; }
#endif

void clear(const Correlation& by) {
    for (int64_t n = 0; n < by.batch; ++n)
        for (int64_t f = 0; f < by.features; ++f)
            for (int64_t y = 0; y < by.positions[0]; ++y)
                for (int64_t x = 0; x < by.positions[1]; ++x)
                    by.out[n * by.out_batch + f * by.out_feature + y * by.out_place[0] + x * by.out_place[1]] = by.bias == nullptr ? 0.0f : by.bias[f];
}

// Of the places of the result that a stride apart share their taps, one axis at a time: its first, how many, and the correlation's
// taps and padding.
struct Class {
    int64_t first, count, tap, taps, before;
};

Class class_of(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t number) {
    if (stride == 1) return {0, size, 0, kernel, (kernel - 1) * dilation - padding};
    const int64_t tap = (number + padding) % stride;  // the least that reaches place `number`, in steps of the stride
    const int64_t taps = tap < kernel ? ceil_div(kernel - tap, stride) : 0;
    return {number, size > number ? ceil_div(size - number, stride) : 0, tap, taps, taps - 1 - (number + padding - tap) / stride};
}

}  // namespace

bool convolve(const Convolved& x, int threads) {
    if (tier_in_use() != Tier::amx) return false;
    if (!threads_allowed || threads < 1) threads = 1;
    Correlation by{};
    by.x = x.x, by.batch = x.batch, by.channels = x.channels, by.x_batch = x.x_stride[0], by.x_channel = x.x_stride[1], by.x_row = x.x_stride[2];
    by.features = x.features, by.bias = x.bias, by.out_batch = x.features * x.places[0] * x.places[1], by.out_feature = x.places[0] * x.places[1];
    for (int d = 0; d < 2; ++d) by.size[d] = x.size[d], by.stride[d] = 1, by.dilation[d] = 1;
    if (!x.transposed) {
        by.w = x.w, by.w_feature = x.w_stride[0], by.w_channel = x.w_stride[1], by.out = x.out;
        for (int d = 0; d < 2; ++d) {
            by.w_place[d] = x.w_stride[2 + d], by.taps[d] = x.kernel[d], by.stride[d] = x.stride[d], by.dilation[d] = x.dilation[d];
            by.before[d] = x.padding[d], by.positions[d] = x.places[d], by.out_place[d] = d == 0 ? x.places[1] : 1;
        }
        return correlate(by, threads);
    }
    by.w_feature = x.w_stride[1], by.w_channel = x.w_stride[0];
    bool held = true;
    for (int64_t r = 0; r < x.stride[0]; ++r)
        for (int64_t c = 0; c < x.stride[1]; ++c) {
            const Class classes[2] = {class_of(x.places[0], x.kernel[0], x.stride[0], x.padding[0], x.dilation[0], r),
                                      class_of(x.places[1], x.kernel[1], x.stride[1], x.padding[1], x.dilation[1], c)};
            by.w = x.w, by.out = x.out;
            for (int d = 0; d < 2; ++d) {
                const Class& one = classes[d];
                const int64_t step = d == 0 ? x.places[1] : 1;
                by.w += (one.tap + (one.taps - 1) * x.stride[d]) * x.w_stride[2 + d];  // the last tap first
                by.w_place[d] = -x.stride[d] * x.w_stride[2 + d];
                by.taps[d] = one.taps, by.before[d] = one.before, by.positions[d] = one.count;
                by.dilation[d] = x.stride[d] == 1 ? x.dilation[d] : 1;
                by.out += one.first * step, by.out_place[d] = x.stride[d] * step;
            }
            if (by.positions[0] == 0 || by.positions[1] == 0) continue;
            if (by.taps[0] == 0 || by.taps[1] == 0) clear(by);
            else held = correlate(by, threads) && held;
        }
    return held;
}

}  // namespace hvpfast

#include "offsets.hpp"

#include <algorithm>
#include <array>
#include <list>
#include <mutex>

namespace hvpfast {

OffsetAxis::OffsetAxis(int64_t size_, int64_t kernel_, int64_t stride_, int64_t dilation, int64_t before, int64_t positions_)
    : kernel(kernel_), stride(stride_), size(size_), positions(positions_), phase(size_t(kernel_)), start(size_t(kernel_)),
      pairs(size_t(kernel_ * kernel_)) {
    for (int64_t u = 0; u < kernel; ++u) {
        const int64_t at = u * dilation - before;
        start[size_t(u)] = at >= 0 ? at / stride : -ceil_div(-at, stride);
        phase[size_t(u)] = at - start[size_t(u)] * stride;
    }
    const auto find = [&](int64_t left, int64_t right, int64_t shift) {
        for (size_t c = 0; c < classes.size(); ++c)
            if (classes[c].left_phase == left && classes[c].right_phase == right && classes[c].shift == shift) return int64_t(c);
        classes.push_back({left, right, shift, {}, {}, 0});
        return int64_t(classes.size()) - 1;
    };
    std::vector<int64_t> low(pairs.size()), high(pairs.size());
    for (int64_t u = 0; u < kernel; ++u)
        for (int64_t v = 0; v < kernel; ++v) {
            const size_t pair = size_t(u * kernel + v);
            const int64_t shift = start[size_t(v)] - start[size_t(u)];
            const int64_t of = find(phase[size_t(u)], phase[size_t(v)], shift);
            low[pair] = std::max({start[size_t(u)], int64_t(0), -shift});
            high[pair] = std::min({start[size_t(u)] + positions, phase_size(phase[size_t(u)]), phase_size(phase[size_t(v)]) - shift});
            pairs[pair].of_class = of;
            if (low[pair] < high[pair]) {
                classes[size_t(of)].cuts.push_back(low[pair]);
                classes[size_t(of)].cuts.push_back(high[pair]);
            }
        }
    for (OffsetClass& one : classes) {
        std::sort(one.cuts.begin(), one.cuts.end());
        one.cuts.erase(std::unique(one.cuts.begin(), one.cuts.end()), one.cuts.end());
        one.used.assign(one.cuts.empty() ? 0 : one.cuts.size() - 1, 0);
    }
    for (size_t pair = 0; pair < pairs.size(); ++pair) {
        OffsetClass& one = classes[size_t(pairs[pair].of_class)];
        pairs[pair].first = pairs[pair].last = 0;
        if (low[pair] >= high[pair]) continue;
        pairs[pair].first = std::lower_bound(one.cuts.begin(), one.cuts.end(), low[pair]) - one.cuts.begin();
        pairs[pair].last = std::lower_bound(one.cuts.begin(), one.cuts.end(), high[pair]) - one.cuts.begin();
        for (int64_t s = pairs[pair].first; s < pairs[pair].last; ++s) one.used[size_t(s)] = 1;
    }
    for (size_t c = 0; c < classes.size(); ++c) {
        const int64_t left = classes[c].left_phase, right = classes[c].right_phase, shift = classes[c].shift;
        classes[c].reverse = find(right, left, -shift);
    }
}

OffsetPlan::OffsetPlan(const Convolution& x) {
    for (int d = 0; d < 3; ++d)
        axes.emplace_back(x.size[d], x.kernel[d], x.stride[d], x.dilation[d], x.before[d], x.positions[d]);
    int64_t id[3];
    for (id[0] = 0; id[0] < count(0); ++id[0])
        for (id[1] = 0; id[1] < count(1); ++id[1])
            for (id[2] = 0; id[2] < count(2); ++id[2]) {
                OffsetTriple one{{id[0], id[1], id[2]}, 0, 1, 1, true, true};
                int order = 0;  // of this triple against its reverse
                for (int d = 0; d < 3; ++d) {
                    const OffsetClass& c = of(d, id[d]);
                    if (order == 0) order = id[d] < c.reverse ? -1 : id[d] > c.reverse;
                    one.reverse = one.reverse * count(d) + c.reverse;
                    one.sums *= c.segments();
                    one.products *= c.cuts.empty() ? 0 : c.cuts.back() - c.cuts.front();
                }
                one.computed = order <= 0;
                one.reverse_is_self = order == 0;
                all_sums += one.sums;
                if (one.computed) computed_sums += one.sums, computed_products += one.products;
                triples.push_back(one);
            }
    for (int d = 2; d >= 0; --d)
        if (x.size[d] > 1) band_axis = d;
    for (const OffsetClass& one : axes[size_t(band_axis)].classes) {
        lowest_shift = least(lowest_shift, one.shift);
        highest_shift = most(highest_shift, one.shift);
    }
}

const OffsetTriple& OffsetPlan::of_pair(const int64_t u[3], const int64_t v[3], const OffsetPair* pair[3], int64_t* index) const {
    int64_t at = 0;
    for (int d = 0; d < 3; ++d) {
        pair[d] = &axes[size_t(d)].pairs[size_t(u[d] * axes[size_t(d)].kernel + v[d])];
        at = at * count(d) + pair[d]->of_class;
    }
    *index = at;
    return triples[size_t(at)];
}

std::shared_ptr<const OffsetPlan> offset_plan(const Convolution& x) {
    using Key = std::array<int64_t, 18>;
    static std::mutex mutex;
    static std::list<std::pair<Key, std::shared_ptr<const OffsetPlan>>> remembered;  // the latest first
    Key key;
    for (size_t d = 0; d < 3; ++d)
        key[d] = x.size[d], key[3 + d] = x.kernel[d], key[6 + d] = x.stride[d], key[9 + d] = x.dilation[d], key[12 + d] = x.before[d],
        key[15 + d] = x.positions[d];
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto at = remembered.begin(); at != remembered.end(); ++at)
        if (at->first == key) {
            remembered.splice(remembered.begin(), remembered, at);
            return remembered.front().second;
        }
    remembered.emplace_front(key, std::make_shared<const OffsetPlan>(x));
    if (remembered.size() > 128) remembered.pop_back();
    return remembered.front().second;
}

Images::Images(const OffsetPlan& of, const Band& band) : plan(of) {
    for (int d = 0; d < 3; ++d) {
        const OffsetAxis& axis = plan.axes[size_t(d)];
        strides[d] = axis.stride;
        for (int64_t phase = 0; phase < axis.stride; ++phase) {
            const int64_t whole = axis.phase_size(phase);
            extents[d].push_back(d == plan.band_axis ? most(0, least(whole, band.to) - band.from) : whole);
        }
    }
    for (int64_t z = 0; z < strides[0]; ++z)
        for (int64_t y = 0; y < strides[1]; ++y)
            for (int64_t x = 0; x < strides[2]; ++x) {
                starts.push_back(pixels);
                pixels += extent(0, z) * extent(1, y) * extent(2, x);
            }
}

}  // namespace hvpfast

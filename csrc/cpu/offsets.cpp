#include "offsets.hpp"

#include <algorithm>

namespace hvpfast {

OffsetAxis::OffsetAxis(int64_t size_, int64_t kernel_, int64_t stride_, int64_t dilation, int64_t before, int64_t positions)
    : kernel(kernel_), stride(stride_), size(size_), pairs(size_t(kernel_ * kernel_)) {
    std::vector<int64_t> phase(static_cast<size_t>(kernel)), start(static_cast<size_t>(kernel));
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

}  // namespace hvpfast

// The offset structure of a convolution's patch Gram matrix.
//
// Along one axis, kernel offset u reads input position y * stride + u * dilation - before at output y. With
// u * dilation - before = stride * f_u + phase_u, that is element q = y + f_u of the sub-sampled input `phase_u`. Block
// (u, v) of the Gram matrix correlates phase_u with phase_v at distance f_v - f_u, over the q for which y and both
// elements exist. Pairs (u, v) of one class (phase_u, phase_v, f_v - f_u) therefore sum the same products and differ
// only in their range of q: the ranges' ends cut the axis into segments, each pair is a run of segments, and every
// product is formed once. Nothing is subtracted, so nothing cancels.
#pragma once

#include <vector>

#include "common.hpp"

namespace hvpfast {

struct OffsetClass {
    int64_t left_phase, right_phase, shift;  // right element = left element + shift
    std::vector<int64_t> cuts;               // segment s: q in [cuts[s], cuts[s + 1])
    std::vector<char> used;                  // whether any pair covers segment s
    int64_t reverse;                         // the class of the pairs (v, u)
    int64_t segments() const { return int64_t(used.size()); }
};

struct OffsetPair {
    int64_t of_class, first, last;  // segments [first, last); none if first == last
};

struct OffsetAxis {
    int64_t kernel, stride, size;
    std::vector<OffsetClass> classes;
    std::vector<OffsetPair> pairs;  // [u * kernel + v]
    OffsetAxis(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t before, int64_t positions);
    int64_t phase_size(int64_t phase) const { return phase < size ? (size - phase + stride - 1) / stride : 0; }
    int64_t longest() const { return phase_size(0); }
};

}  // namespace hvpfast

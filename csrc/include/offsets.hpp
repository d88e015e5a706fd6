// The offset structure of a convolution's patch Gram matrix.
//
// Along one axis, kernel offset u reads input position y * stride + u * dilation - before at output y. With
// u * dilation - before = stride * f_u + phase_u, that is element q = y + f_u of the sub-sampled input `phase_u`. Block
// (u, v) of the Gram matrix correlates phase_u with phase_v at distance f_v - f_u, over the q for which y and both
// elements exist. Pairs (u, v) of one class (phase_u, phase_v, f_v - f_u) therefore sum the same products and differ
// only in their range of q: the ranges' ends cut the axis into segments, each pair is a run of segments, and every
// product is formed once. Nothing is subtracted, so nothing cancels.
#pragma once

#include <memory>
#include <vector>

#include "common.hpp"
#include "kernels.hpp"

namespace hvpfast {

struct OffsetClass {
    int64_t left_phase, right_phase, shift;  // right element = left element + shift
    std::vector<int64_t> cuts;               // segment s: q in [cuts[s], cuts[s + 1])
    std::vector<char> used;                  // whether any pair covers segment s
    int64_t reverse;                         // the class of the pairs (v, u); its segments are this one's, shifted
    int64_t segments() const { return int64_t(used.size()); }
};

struct OffsetPair {
    int64_t of_class, first, last;  // segments [first, last); none if first == last
};

struct OffsetAxis {
    int64_t kernel, stride, size, positions;
    std::vector<int64_t> phase, start;  // of each kernel offset
    std::vector<OffsetClass> classes;
    std::vector<OffsetPair> pairs;  // [u * kernel + v]
    OffsetAxis(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t before, int64_t positions);
    int64_t phase_size(int64_t which) const { return which < size ? (size - which + stride - 1) / stride : 0; }
    int64_t longest() const { return phase_size(0); }
};

// One class on every axis. Of a class and its reverse only the one with `computed` need be summed: S_reverse = S'.
struct OffsetTriple {
    int64_t of_class[3], reverse, sums, products;  // segments; pixel pairs of one sample
    bool computed;
    bool symmetric() const { return computed && reverse_is_self; }
    bool reverse_is_self;
};

struct OffsetPlan {
    std::vector<OffsetAxis> axes;
    std::vector<OffsetTriple> triples;  // [class z][class y][class x]
    int64_t computed_sums = 0, all_sums = 0, computed_products = 0;
    int band_axis = 2;                    // the first axis of more than one pixel: images are cut along it
    int64_t lowest_shift = 0, highest_shift = 0;  // along it
    explicit OffsetPlan(const Convolution& x);
    int64_t count(int d) const { return int64_t(axes[size_t(d)].classes.size()); }
    const OffsetClass& of(int d, int64_t one) const { return axes[size_t(d)].classes[size_t(one)]; }
    const OffsetTriple& of_pair(const int64_t u[3], const int64_t v[3], const OffsetPair* pair[3], int64_t* index) const;
};

// Remembered for the last few geometries: a layer asks for the same one in every step.
std::shared_ptr<const OffsetPlan> offset_plan(const Convolution& x);

// A part of a batch: samples [first, first + samples), and of every phase image the elements [from, from + ...) along
// the band axis that the left elements [left, left_end) correlate with.
struct Band {
    int64_t first, samples, left, left_end, from, to;
};

// The packed pixels of a band: phase image after phase image, each with its extents.
struct Images {
    const OffsetPlan& plan;
    int64_t strides[3];
    std::vector<int64_t> starts, extents[3];  // extents[d][phase]
    int64_t pixels = 0;
    Images(const OffsetPlan& of, const Band& band);
    int64_t start(int64_t z, int64_t y, int64_t x) const { return starts[size_t((z * strides[1] + y) * strides[2] + x)]; }
    int64_t extent(int d, int64_t phase) const { return extents[d][size_t(phase)]; }
};

}  // namespace hvpfast

// A correlation of images with weights, of which convolutions and their input gradients are made.
#pragma once

#include "common.hpp"

namespace hvpfast {

// out[n, f, y, x] = bias[f] + sum over c, i, j of w[f, c, i, j] x[n, c, y stride + i dilation - before, likewise], zero outside.
// Strides in elements; the columns of x lie side by side. `before` may be negative.
struct Correlation {
    const float* x;
    int64_t batch, channels, size[2], x_batch, x_channel, x_row;
    const float* w;
    int64_t features, w_feature, w_channel, w_place[2], taps[2];
    int64_t stride[2], dilation[2], before[2];
    const float* bias;  // (features,), or null
    float* out;
    int64_t positions[2], out_batch, out_feature, out_place[2];
};

// How it is computed on AMX (correlate_amx.cpp): plain numbers, since that file's code may not leave it.
struct CorrelationPlan {
    Correlation by;
    int64_t taps, groups, panels;        // groups of 32 channels, panels of 32 features
    bool rows;                           // tiles lie inside rows of the result
    int64_t columns, remainders;         // copies: for each column of taps, for each remainder of a tap's row
    int64_t reach, pitch, band;          // rows that taps reach further down; lanes from row to row; rows of a band of the result
    int64_t plane, copy_bytes, group_bytes;
    int64_t together, images;            // groups and images packed at a time
    const int64_t *remainder, *at;       // of a row of taps, its remainder's number; of a tap, the byte where it begins
    int64_t packed;                      // groups whose weights are packed at a time
    int64_t panel_bytes;                 // of packed weights
};

// Bits of the largest values that were packed.
struct CorrelationSeen {
    uint32_t weights = 0, images = 0;
};

// Those of a panel and of groups of channels [from_group, to_group).
void pack_weights(const CorrelationPlan& plan, int64_t panel, int64_t from_group, int64_t to_group, char* to, CorrelationSeen& seen);
// Within the AMX engine's `begin` and `end`, one thread's share of what these groups add: images [first, last), panels of features [from, to).
void correlate_share(const CorrelationPlan& plan, int64_t first, int64_t last, int64_t from, int64_t to, int64_t from_group, int64_t to_group,
                     const char* weights, char* packed, CorrelationSeen& seen);

}  // namespace hvpfast

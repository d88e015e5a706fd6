// Inner loops of conv_gram, one set a tier. No std:: template may come in here: see engine_body.hpp.
#pragma once

#include "common.hpp"

namespace hvpfast {

template <class T>
struct ConvKernels {
    int64_t lanes;
    // to[r * pitch + l] = base[offsets[l] + r] for `count` rows; lanes from `used` on are zero.
    void (*turn)(const T* base, const int64_t* offsets, int64_t used, int64_t count, T* to, int64_t pitch);
    // out[c * pitch + v] = alpha * sum_k sources[v][k][c] for nv sources (of counts[v] rows each, all `shift` further on)
    // and nc columns: interleaves, for a row of the result, the kernel offsets v of every channel c.
    void (*weave)(const T* const* sources, const int64_t* counts, int64_t nv, int64_t shift, int64_t nc, T alpha, T* out, int64_t pitch);
    void (*transpose)(const T* from, int64_t from_pitch, T* to, int64_t to_pitch, int64_t rows, int64_t cols);  // multiples of `lanes`
    // sums[a * sums_pitch + at[b]] += sum over four nested runs of left_a * right_b, lane by lane: vectors at base +
    // a * left_pitch and base + right[b]; `extent` and `step` from the outermost run to the innermost.
    void (*products)(const T* base, int64_t left_count, int64_t left_pitch, const int64_t* right, int64_t right_count,
                     const int64_t extent[4], const int64_t step[4], T* sums, int64_t sums_pitch, const int64_t* at);
};

const ConvKernels<float>& conv_kernels_f32(Tier tier);
const ConvKernels<double>& conv_kernels_f64(Tier tier);
inline const ConvKernels<float>& conv_kernels(Tier tier, float) { return conv_kernels_f32(tier); }
inline const ConvKernels<double>& conv_kernels(Tier tier, double) { return conv_kernels_f64(tier); }

}  // namespace hvpfast

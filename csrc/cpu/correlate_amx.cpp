// Correlations of images on AMX, in bf16x3: no patch is formed, and each value of x is split into halves once a tap's column.
//
// A tile of the result is 16 features x 16 neighbouring positions; the sum over 32 channels at one tap is a product of a
// tile of weights, [feature][channel pair], and one of the image, [channel pair][position], which is read where the image was
// packed: [32 channels][copy][hi, lo][channel pair][row][column], in which a tap's row is a step in memory. Where rows are
// multiples of 16 so is its column, and there is one copy; else rows of the result follow each other without a gap, and
// each column of taps has a copy of its own, already moved. A stride has copies of the rows of each remainder.
//
// Weights are packed once for all threads. A block of images (or a band of one) is packed for a few channels at a time, which
// all features are then multiplied with: results stay in L2 and are added to.
#include "correlation.hpp"

#if HVPFAST_AMX
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics: bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,amx-tile,amx-bf16")
#endif

namespace hvpfast {
namespace {
#include "amx_split.hpp"

constexpr int64_t kTile = 1024, kWeights = 4 * kTile;  // bytes: of a tile; of 32 features x 32 channels, hi and lo

HVPFAST_INLINE void note(const Split& seen, uint32_t& largest) {
    const uint32_t bits = uint32_t(_mm512_reduce_max_epu32(seen.largest)) >> 1;
    largest = bits > largest ? bits : largest;
}

HVPFAST_INLINE __mmask16 first_lanes(int64_t n) { return n >= 16 ? __mmask16(0xffff) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1); }

using Plan = CorrelationPlan;

HVPFAST_INLINE int64_t tiles_of(const Plan& plan, int64_t lines) {
    return plan.rows ? lines * (plan.by.positions[1] / 16) : ceil_div(lines * plan.by.positions[1], 16);
}

HVPFAST_INLINE void fill(float* at, int64_t count, float value) {
    for (int64_t i = 0; i < count; ++i) at[i] = value;
}

// A row of two channels (`second` may be null) from column `from` on, every `step`th, as `lanes` lanes.
HVPFAST_INLINE void pack_row(const float* first, const float* second, int64_t from, int64_t step, int64_t size, int64_t lanes, int32_t* high, int32_t* low, Split& seen) {
    const __m512i steps = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(int(step)));
    const int64_t inside = from >= 0 ? 0 : ceil_div(-from, step), outside = size > from ? ceil_div(size - from, step) : 0;  // lanes [inside, outside) are there
    for (int64_t lane = 0; lane < lanes; lane += 16) {
        const __mmask16 written = first_lanes(lanes - lane), there = __mmask16(first_lanes(outside - lane) & ~first_lanes(inside - lane));
        const int64_t column = from + lane * step;
        __m512 one = _mm512_setzero_ps(), other = one;
        if (step == 1) {
            one = _mm512_maskz_loadu_ps(there, first + column);
            if (second != nullptr) other = _mm512_maskz_loadu_ps(there, second + column);
        } else {
            one = _mm512_mask_i32gather_ps(one, there, steps, first + column, 4);
            if (second != nullptr) other = _mm512_mask_i32gather_ps(other, there, steps, second + column, 4);
        }
        __m512i upper, lower;
        split_pair<2>(one, other, seen, upper, lower);
        _mm512_mask_storeu_epi32(high + lane, written, upper);
        _mm512_mask_storeu_epi32(low + lane, written, lower);
    }
}

HVPFAST_INLINE void clear(int32_t* at, int64_t lanes) {
    for (int64_t lane = 0; lane < lanes; lane += 16) _mm512_mask_storeu_epi32(at + lane, first_lanes(lanes - lane), _mm512_setzero_si512());
}

// 32 channels of an image, for rows [line, line + lines) of the result.
void pack_image(const Plan& plan, int64_t image, int64_t line, int64_t lines, int64_t group, char* to, Split& seen) {
    const Correlation& by = plan.by;
    for (int64_t column = 0; column < plan.columns; ++column)
        for (int64_t i = 0, done = 0; i < by.taps[0] && done < plan.remainders; ++i) {
            if (plan.remainder[i] != done) continue;  // the first row of taps with each remainder
            const int64_t rest = i * by.dilation[0] % by.stride[0];
            int32_t* const copy = reinterpret_cast<int32_t*>(to + (column * plan.remainders + done++) * plan.copy_bytes);
            for (int64_t pair = 0; pair < 16; ++pair) {
                const int64_t channel = group * 32 + 2 * pair;
                int32_t *const high = copy + pair * plan.plane, *const low = high + 16 * plan.plane;
                for (int64_t r = 0; r < lines + plan.reach; ++r) {
                    const int64_t row = (line + r) * by.stride[0] + rest - by.before[0];
                    if (channel < by.channels && row >= 0 && row < by.size[0]) {
                        const float* const from = by.x + image * by.x_batch + channel * by.x_channel + row * by.x_row;
                        pack_row(from, channel + 1 < by.channels ? from + by.x_channel : nullptr, column * by.dilation[1] - by.before[1],
                                 by.stride[1], by.size[1], plan.pitch, high + r * plan.pitch, low + r * plan.pitch, seen);
                    } else {
                        clear(high + r * plan.pitch, plan.pitch);
                        clear(low + r * plan.pitch, plan.pitch);
                    }
                }
                const int64_t used = (lines + plan.reach) * plan.pitch;
                clear(high + used, plan.plane - used);
                clear(low + used, plan.plane - used);
            }
        }
}

// 16 positions of the result: where its image is packed, and where it goes: straight, or by way of a tile in L1.
struct Place {
    const char* from;
    float* to;
    int64_t row, column, count;  // of its first position; positions that are there
    bool straight;
};

struct Sums {
    float* at;
    int64_t step;  // bytes
};

class Block {
public:
    Block(const Plan& plan, const char* packed, int64_t image, int64_t line, int64_t lines) : plan_(plan), packed_(packed), image_(image), line_(line), lines_(lines) {}

    Place place(int64_t tile) const {
        const Correlation& by = plan_.by;
        const int64_t each = tiles_of(plan_, lines_), image = tile / each, number = tile % each, across = by.positions[1] / 16;
        const int64_t flat = number * 16;
        Place at{};
        at.row = plan_.rows ? number / across : flat / by.positions[1];
        at.column = plan_.rows ? number % across * 16 : flat % by.positions[1];
        at.count = plan_.rows ? 16 : least(16, lines_ * by.positions[1] - flat);
        at.from = packed_ + image * plan_.together * plan_.group_bytes + 4 * (plan_.rows ? at.row * plan_.pitch + at.column : flat);
        at.row += line_;
        at.to = by.out + (image_ + image) * by.out_batch;
        at.straight = by.out_place[1] == 1 && (plan_.rows || by.out_place[0] == by.positions[1]) && at.count == 16;
        return at;
    }

    // The sums of 32 features x 2 x 16 positions over `groups` groups; `weights` of the panel's first of them.
    void sum(int64_t panel, const char* weights, int64_t groups, bool first, const Place& left, const Place* right, const float* bias, float* held) const {
        const Place& second = right == nullptr ? left : *right;
        const Sums one = sums(panel, first, left, bias, held), other = sums(panel, first, second, bias, held + 512);
        _tile_loadd(0, one.at, one.step);
        _tile_loadd(2, one.at + 4 * one.step, one.step);  // 16 rows on
        _tile_loadd(1, other.at, other.step);
        _tile_loadd(3, other.at + 4 * other.step, other.step);
        const int64_t row = plan_.plane * 4, low = 16 * row;
        const char* a = weights;
        for (int64_t group = 0; group < groups; ++group)
            for (int64_t tap = 0; tap < plan_.taps; ++tap, a += kWeights) {
                const int64_t at = group * plan_.group_bytes + plan_.at[tap];
                const char *const b0 = left.from + at, *const b1 = second.from + at;
                _tile_loadd(6, b0, row);
                _tile_loadd(4, a + kTile, 64);
                _tile_dpbf16ps(0, 4, 6);  // lo hi'
                _tile_loadd(7, b1, row);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a + 3 * kTile, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_loadd(4, a, 64);
                _tile_dpbf16ps(3, 5, 7);
                _tile_loadd(5, a + 2 * kTile, 64);
                _tile_dpbf16ps(0, 4, 6);  // hi hi'
                _tile_dpbf16ps(2, 5, 6);
                _tile_loadd(6, b0 + low, row);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
                _tile_loadd(7, b1 + low, row);
                _tile_dpbf16ps(0, 4, 6);  // hi lo'
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        const Sums to = ends(panel, left, held), next = ends(panel, second, held + 512);
        _tile_stored(0, to.at, to.step);
        _tile_stored(2, to.at + 4 * to.step, to.step);
        if (right != nullptr) {
            _tile_stored(1, next.at, next.step);
            _tile_stored(3, next.at + 4 * next.step, next.step);
        }
        __asm__ volatile("" ::: "memory");
        scatter(panel, left, held);
        if (right != nullptr) scatter(panel, second, held + 512);
    }

private:
    const Plan& plan_;
    const char* packed_;
    int64_t image_, line_, lines_;

    bool straight(const Place& at, int64_t panel) const { return at.straight && plan_.by.features - panel * 32 >= 32; }
    float* target(const Place& at, int64_t panel) const {
        return at.to + panel * 32 * plan_.by.out_feature + at.row * plan_.by.out_place[0] + at.column * plan_.by.out_place[1];
    }

    // Whether the positions are a step apart that a vector's offsets hold.
    bool in_a_row(const Place& at) const { return plan_.rows && at.count == 16 && plan_.by.out_place[1] < (int64_t(1) << 26); }

    // Calls each(feature's number in the panel, its first element of the result, 16 offsets).
    template <class Each>
    void each_feature(int64_t panel, const Each& each, const Place& at) const {
        const __m512i steps = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(int(plan_.by.out_place[1])));
        float* to = target(at, panel);
        for (int64_t f = 0; f < least(32, plan_.by.features - panel * 32); ++f, to += plan_.by.out_feature) each(f, to, steps);
    }

    // Calls each(feature's number in the panel, position's number, element of the result).
    template <class Each>
    void scattered(const Place& at, int64_t panel, const Each& each) const {
        const Correlation& by = plan_.by;
        for (int64_t p = 0, row = at.row, column = at.column; p < at.count; ++p) {
            float* to = at.to + panel * 32 * by.out_feature + row * by.out_place[0] + column * by.out_place[1];
            for (int64_t f = 0; f < least(32, by.features - panel * 32); ++f, to += by.out_feature) each(f, p, to);
            if (++column == by.positions[1]) column = 0, ++row;
        }
    }

    // Where the sums of 32 features x 16 positions begin with what they are: in the result, or gathered.
    Sums sums(int64_t panel, bool first, const Place& at, const float* bias, float* held) const {
        if (first) return {const_cast<float*>(bias), 64};
        const Sums found = ends(panel, at, held);
        if (found.at == held) {
            fill(held, 512, 0.0f);
            if (in_a_row(at)) each_feature(panel, [&](int64_t f, const float* from, __m512i steps) { _mm512_storeu_ps(held + f * 16, _mm512_i32gather_ps(steps, from, 4)); }, at);
            else scattered(at, panel, [&](int64_t f, int64_t p, const float* from) { held[f * 16 + p] = *from; });
            __asm__ volatile("" ::: "memory");
        }
        return found;
    }

    // Where tiles of them are stored, and how many bytes apart their rows.
    Sums ends(int64_t panel, const Place& at, float* held) const {
        if (straight(at, panel)) return {target(at, panel), plan_.by.out_feature * 4};
        return {held, 64};
    }

    void scatter(int64_t panel, const Place& at, const float* held) const {
        if (straight(at, panel)) return;
        if (in_a_row(at)) each_feature(panel, [&](int64_t f, float* to, __m512i steps) { _mm512_i32scatter_ps(to, steps, _mm512_loadu_ps(held + f * 16), 4); }, at);
        else scattered(at, panel, [&](int64_t f, int64_t p, float* to) { *to = held[f * 16 + p]; });
    }
};

}  // namespace

// Weights of 32 features: [group][tap][16 features][hi, lo], a tile each.
void pack_weights(const Plan& plan, int64_t panel, int64_t from_group, int64_t to_group, char* to, CorrelationSeen& largest) {
    Split seen{_mm512_setzero_si512(), _mm512_setzero_ps()};
    const Correlation& by = plan.by;
    const __m512i steps = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(int(by.w_channel)));
    alignas(64) float run[32];
    for (int64_t group = from_group; group < to_group; ++group) {
        const int64_t channel = group * 32;
        const __mmask16 first = first_lanes(by.channels - channel), second = first_lanes(by.channels - channel - 16);
        for (int64_t row = 0; row < 32; ++row) {
            const int64_t feature = panel * 32 + row;
            for (int64_t tap = 0; tap < plan.taps; ++tap) {
                char* const tile = to + ((group - from_group) * plan.taps + tap) * kWeights + row / 16 * 2 * kTile + row % 16 * 64;
                __m512i high = _mm512_setzero_si512(), low = high;
                if (feature < by.features) {
                    const float* const from = by.w + feature * by.w_feature + channel * by.w_channel + tap / by.taps[1] * by.w_place[0] + tap % by.taps[1] * by.w_place[1];
                    _mm512_store_ps(run, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first, steps, from, 4));
                    _mm512_store_ps(run + 16, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), second, steps, from + 16 * by.w_channel, 4));
                    __m512 squares = _mm512_setzero_ps();
                    split_run<2>(run, seen, high, low, squares);
                }
                _mm512_storeu_si512(tile, high);
                _mm512_storeu_si512(tile + kTile, low);
            }
        }
    }
    note(seen, largest.weights);
}

void correlate_share(const Plan& plan, int64_t first, int64_t last, int64_t from, int64_t to, int64_t from_group, int64_t to_group, const char* weights,
                     char* packed, CorrelationSeen& largest) {
    const Correlation& by = plan.by;
    Split seen{_mm512_setzero_si512(), _mm512_setzero_ps()};
    alignas(64) float bias[32 * 16], held[2 * 32 * 16];
    for (int64_t image = first; image < last; image += plan.images)
        for (int64_t line = 0; line < by.positions[0]; line += plan.band) {
            const int64_t count = least(plan.images, last - image), lines = least(plan.band, by.positions[0] - line);
            const Block block(plan, packed, image, line, lines);
            const int64_t tiles = count * tiles_of(plan, lines);
            for (int64_t group = from_group; group < to_group; group += plan.together) {
                const int64_t some = least(plan.together, to_group - group);
                for (int64_t n = 0; n < count; ++n)
                    for (int64_t g = 0; g < some; ++g)
                        pack_image(plan, image + n, line, lines, group + g, packed + (n * plan.together + g) * plan.group_bytes, seen);
                __asm__ volatile("" ::: "memory");
                for (int64_t panel = from; panel < to; ++panel) {
                    for (int64_t f = 0; f < 32; ++f) fill(bias + f * 16, 16, by.bias != nullptr && panel * 32 + f < by.features ? by.bias[panel * 32 + f] : 0.0f);
                    __asm__ volatile("" ::: "memory");
                    const char* const a = weights + panel * plan.panel_bytes + (group - from_group) * plan.taps * kWeights;
                    for (int64_t tile = 0; tile < tiles; tile += 2) {
                        const Place left = block.place(tile);
                        const bool both = tile + 1 < tiles;
                        const Place right = both ? block.place(tile + 1) : left;
                        block.sum(panel, a, some, group == 0, left, both ? &right : nullptr, bias, held);
                    }
                }
            }
        }
    note(seen, largest.images);
}

}  // namespace hvpfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// conv_gram by offsets for few channels a group: a vector lane for each group, or for each group of several samples
// where there are few groups. Nothing is multiplied that is not needed, and the borders cost no more than the middle.
//
// A strip of lanes is packed [sample set][channel][phase image][pixel][lane], all phase images with equal extents, so
// that one step leads along all of them. For each phase image of the left element, the cuts of all its classes divide it into
// regions in each of which the same sums are added to.
#include <array>
#include <cstring>
#include <list>
#include <mutex>
#include <vector>

#include "conv.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

struct Region {
    int64_t left;              // phase image of the left element
    int64_t low[3], high[3];   // elements along each axis
    size_t first, last;        // its terms
};

struct Term {
    int64_t image, shift[3];  // of the right element
    int64_t sum;
};

// Regions and terms of a geometry, for any number of channels.
struct LanesPlan {
    std::shared_ptr<const OffsetPlan> offsets;
    std::vector<Region> regions;
    std::vector<Term> terms;
    std::vector<int64_t> first_sum;  // of each computed triple

    explicit LanesPlan(std::shared_ptr<const OffsetPlan> of) : offsets(std::move(of)), first_sum(offsets->triples.size(), -1) {
        const OffsetPlan& plan = *offsets;
        int64_t sums = 0;
        for (size_t t = 0; t < plan.triples.size(); ++t)
            if (plan.triples[t].computed) first_sum[t] = sums, sums += plan.triples[t].sums;
        struct Interval {
            int64_t low, high;
            std::vector<std::array<int64_t, 2>> in;  // (class, segment)
        };
        std::vector<std::vector<Interval>> intervals[3];  // [axis][phase]
        for (int d = 0; d < 3; ++d) {
            const OffsetAxis& axis = plan.axes[size_t(d)];
            intervals[d].resize(size_t(axis.stride));
            for (int64_t phase = 0; phase < axis.stride; ++phase) {
                std::vector<char> is_cut(size_t(axis.longest() + 1), 0);
                for (const OffsetClass& one : axis.classes)
                    if (one.left_phase == phase)
                        for (const int64_t cut : one.cuts) is_cut[size_t(cut)] = 1;
                int64_t low = -1;
                for (int64_t at = 0; at <= axis.longest(); ++at) {
                    if (!is_cut[size_t(at)]) continue;
                    if (low >= 0) {
                        Interval interval{low, at, {}};
                        for (size_t c = 0; c < axis.classes.size(); ++c) {
                            const OffsetClass& one = axis.classes[c];
                            if (one.left_phase != phase) continue;
                            for (int64_t s = 0; s < one.segments(); ++s)
                                if (one.used[size_t(s)] && one.cuts[size_t(s)] <= low && at <= one.cuts[size_t(s) + 1])
                                    interval.in.push_back({int64_t(c), s});
                        }
                        if (!interval.in.empty()) intervals[d][size_t(phase)].push_back(interval);
                    }
                    low = at;
                }
            }
        }
        const int64_t s1 = plan.axes[1].stride, s2 = plan.axes[2].stride;
        for (int64_t pz = 0; pz < plan.axes[0].stride; ++pz)
            for (int64_t py = 0; py < s1; ++py)
                for (int64_t px = 0; px < s2; ++px)
                    for (const Interval& iz : intervals[0][size_t(pz)])
                        for (const Interval& iy : intervals[1][size_t(py)])
                            for (const Interval& ix : intervals[2][size_t(px)]) {
                                Region region{(pz * s1 + py) * s2 + px, {iz.low, iy.low, ix.low}, {iz.high, iy.high, ix.high}, terms.size(), 0};
                                for (const auto& [cz, sz] : iz.in)
                                    for (const auto& [cy, sy] : iy.in)
                                        for (const auto& [cx, sx] : ix.in) {
                                            const size_t t = size_t((cz * plan.count(1) + cy) * plan.count(2) + cx);
                                            if (!plan.triples[t].computed) continue;
                                            const OffsetClass &z = plan.of(0, cz), &y = plan.of(1, cy), &x = plan.of(2, cx);
                                            terms.push_back({(z.right_phase * s1 + y.right_phase) * s2 + x.right_phase,
                                                             {z.shift, y.shift, x.shift},
                                                             first_sum[t] + (sz * y.segments() + sy) * x.segments() + sx});
                                        }
                                region.last = terms.size();
                                if (region.last > region.first) regions.push_back(region);
                            }
    }
};

std::shared_ptr<const LanesPlan> lanes_plan(const Convolution& x) {
    static std::mutex mutex;
    static std::list<std::shared_ptr<const LanesPlan>> remembered;  // the latest first
    const std::shared_ptr<const OffsetPlan> offsets = offset_plan(x);
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto at = remembered.begin(); at != remembered.end(); ++at)
        if ((*at)->offsets == offsets) {
            remembered.splice(remembered.begin(), remembered, at);
            return remembered.front();
        }
    remembered.push_front(std::make_shared<const LanesPlan>(offsets));
    if (remembered.size() > 32) remembered.pop_back();
    return remembered.front();
}

struct Item {
    int64_t strip;
    Band band;  // `samples`: sets of samples
};

template <class T>
struct Lanes {
    const ConvKernels<T>& kernels;
    const Convolution& x;
    const LanesPlan& plan;
    const OffsetPlan& offsets;
    int64_t width, fold, strips, images, sums;  // `fold`: samples whose groups share a strip
    int64_t extent[3];
    std::vector<Item> items;  // a strip's are neighbours
    bool by_strip;            // threads own strips, else items

    Lanes(const Convolution& of, const LanesPlan& by, const ConvKernels<T>& with, int threads)
        : kernels(with), x(of), plan(by), offsets(*by.offsets), width(with.lanes) {
        fold = least(most(1, width / x.groups), x.batch);
        strips = ceil_div(x.groups * fold, width);
        images = x.stride[0] * x.stride[1] * x.stride[2];
        sums = offsets.computed_sums * x.channels * x.channels;
        for (int d = 0; d < 3; ++d) extent[d] = offsets.axes[size_t(d)].longest();
        by_strip = strips >= 4 * threads || threads == 1;
        const int64_t sets = ceil_div(x.batch, fold), length = extent[offsets.band_axis];
        const int64_t halo = offsets.highest_shift - offsets.lowest_shift, row = set_bytes(length) / length;
        const int64_t aim = l2_bytes() * 4 / 10;
        int64_t chunk = most(1, least(16, aim / set_bytes(length))), bands = 1;
        if (set_bytes(length) > 2 * aim) bands = ceil_div(length, most(most(1, halo), aim / row - halo));
        bands = most(1, least(bands, length));
        int64_t chunks = ceil_div(sets, chunk);
        if (!by_strip) {
            chunks = most(chunks, least(sets, threads));
            while (strips * chunks * bands % threads != 0 && strips * chunks * bands < 8 * threads && bands < length / 2) ++bands;
        }
        for (int64_t strip = 0; strip < strips; ++strip)
            for (int64_t c = 0; c < chunks; ++c)
                for (int64_t b = 0; b < bands; ++b) {
                    const int64_t first = sets * c / chunks;
                    Band band{first, sets * (c + 1) / chunks - first, length * b / bands, length * (b + 1) / bands, 0, 0};
                    band.from = most(0, band.left + offsets.lowest_shift);
                    band.to = bands == 1 ? length : least(length, band.left_end + offsets.highest_shift);
                    items.push_back({strip, band});
                }
    }

    // One sample set with `length` elements along the band axis.
    int64_t pixels(int64_t length) const { return extent[0] * extent[1] * extent[2] / extent[offsets.band_axis] * length; }
    int64_t set_elements(int64_t length) const { return x.channels * images * pixels(length) * width; }
    int64_t set_bytes(int64_t length) const { return set_elements(length) * int64_t(sizeof(T)); }
    int64_t packed_bytes() const {
        int64_t found = 0;
        for (const Item& item : items) found = most(found, item.band.samples * set_bytes(item.band.to - item.band.from));
        return found;
    }
    int64_t flat_elements() const { return width * extent[2]; }
    int64_t sums_elements() const { return strips * sums * width; }

    // Values that are not there (the equal extents of phase images, lanes) are never multiplied or are zero.
    void pack(const Item& item, T* to, T* flat) const {
        const int64_t length = item.band.to - item.band.from, pixels_each = pixels(length), step = x.stride[2] * x.space_stride[2];
        const bool plain = x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32) && (step == 1 || x.channel_stride == 1);
        int64_t size[3] = {extent[0], extent[1], extent[2]}, from[3] = {0, 0, 0}, apart[64], flat_at[64];
        size[offsets.band_axis] = length, from[offsets.band_axis] = item.band.from;
        const bool joined = step == 1 && plain && images == 1 && x.space_stride[1] == x.size[2] && size[2] == x.size[2] &&
                            (size[0] == 1 || (x.space_stride[0] == x.size[1] * x.size[2] && size[1] == x.size[1]));
        for (int64_t l = 0; l < width; ++l) flat_at[l] = l * extent[2];
        for (int64_t set = 0; set < item.band.samples; ++set) {
            const int64_t n0 = (item.band.first + set) * fold, valid = least(fold, x.batch - n0);
            const int64_t used = fold > 1 ? valid * x.groups : least(width, x.groups - item.strip * width);
            for (int64_t c = 0; c < x.channels; ++c, to += images * pixels_each * width) {
                for (int64_t l = 0; l < used; ++l) {
                    const int64_t lane = fold > 1 ? l : item.strip * width + l;
                    apart[l] = (n0 + lane / x.groups) * x.batch_stride + (lane % x.groups * x.channels + c) * x.channel_stride;
                }
                int64_t image = 0;
                for (int64_t pz = 0; pz < x.stride[0]; ++pz)
                    for (int64_t py = 0; py < x.stride[1]; ++py)
                        for (int64_t px = 0; px < x.stride[2]; ++px, ++image) {
                            const int64_t there = least(size[2], most(0, offsets.axes[2].phase_size(px) - from[2]));
                            for (int64_t z = 0; z < size[0]; ++z)
                                for (int64_t y = 0; y < size[1]; ++y) {
                                    const int64_t zz = pz + (z + from[0]) * x.stride[0], yy = py + (y + from[1]) * x.stride[1];
                                    if (zz >= x.size[0] || yy >= x.size[1] || there == 0) continue;
                                    const int64_t offset = zz * x.space_stride[0] + yy * x.space_stride[1] + (px + from[2] * x.stride[2]) * x.space_stride[2];
                                    T* const row = to + (image * pixels_each + (z * size[1] + y) * size[2]) * width;
                                    if (joined) {  // all rows are one
                                        kernels.turn(static_cast<const T*>(x.data) + offset, apart, used, pixels_each, row, width);
                                        z = size[0], y = size[1];
                                    } else if (plain && step == 1) {
                                        kernels.turn(static_cast<const T*>(x.data) + offset, apart, used, there, row, width);
                                    } else if (plain) {  // lanes that are neighbours
                                        for (int64_t q = 0; q < there; ++q)
                                            kernels.turn(static_cast<const T*>(x.data) + offset + q * step, apart, used, 1, row + q * width, width);
                                    } else {
                                        for (int64_t l = 0; l < used; ++l) read_values(x, apart[l] + offset, step, there, flat + l * extent[2]);
                                        kernels.turn(flat, flat_at, used, there, row, width);
                                    }
                                }
                        }
            }
        }
    }

    void correlate(const Item& item, const T* packed, T* own) const {
        const int64_t length = item.band.to - item.band.from, pixels_each = pixels(length);
        int64_t size[3] = {extent[0], extent[1], extent[2]}, from[3] = {0, 0, 0};
        size[offsets.band_axis] = length, from[offsets.band_axis] = item.band.from;
        const int64_t pitch[3] = {size[1] * size[2] * width, size[2] * width, width};
        const int64_t channel = images * pixels_each * width, cc = x.channels;
        constexpr int64_t kMost = 48;
        int64_t right[kMost], at[kMost];
        for (const Region& region : plan.regions) {
            int64_t low[3], high[3], base = region.left * pixels_each * width;
            bool empty = false;
            for (int d = 0; d < 3; ++d) {
                low[d] = region.low[d], high[d] = region.high[d];
                if (d == offsets.band_axis) low[d] = most(low[d], item.band.left), high[d] = least(high[d], item.band.left_end);
                empty = empty || low[d] >= high[d];
                base += (low[d] - from[d]) * pitch[d];
            }
            if (empty) continue;
            const int64_t counts[4] = {item.band.samples, high[0] - low[0], high[1] - low[1], high[2] - low[2]};
            const int64_t steps[4] = {cc * channel, pitch[0], pitch[1], pitch[2]};
            int64_t held = 0;
            for (size_t t = region.first; t < region.last; ++t) {
                const Term& term = plan.terms[t];
                for (int64_t c = 0; c < cc; ++c) {
                    right[held] = (term.image - region.left) * pixels_each * width + c * channel + term.shift[0] * pitch[0] +
                                  term.shift[1] * pitch[1] + term.shift[2] * pitch[2];
                    at[held] = (term.sum * cc * cc + c) * width;
                    if (++held == kMost || (t + 1 == region.last && c + 1 == cc)) {
                        kernels.products(packed + base, cc, channel, right, held, counts, steps, own, cc * width, at);
                        held = 0;
                    }
                }
            }
        }
    }
};

// Rows [first, last) of the patch Gram matrix of one group from sums of which each is `apart` values from the next.
template <class T>
void write_rows(const Convolution& x, const LanesPlan& plan, const T* sums, int64_t apart, int64_t first, int64_t last, T alpha, T beta,
                T* out, int64_t row_stride, int64_t col_stride) {
    const OffsetPlan& offsets = *plan.offsets;
    const int64_t k1 = x.kernel[1], k2 = x.kernel[2], every = x.offsets(), cc = x.channels;
    for (int64_t u = 0; u < every; ++u)
        for (int64_t v = 0; v < every; ++v) {
            const int64_t at_u[3] = {u / (k1 * k2), u / k2 % k1, u % k2}, at_v[3] = {v / (k1 * k2), v / k2 % k1, v % k2};
            const OffsetPair* pair[3];
            int64_t triple;
            const OffsetTriple& one = offsets.of_pair(at_u, at_v, pair, &triple);
            const bool turned = !one.computed;
            const int64_t from = plan.first_sum[size_t(turned ? one.reverse : triple)];
            const int64_t ny = offsets.of(1, one.of_class[1]).segments(), nx = offsets.of(2, one.of_class[2]).segments();
            for (int64_t a = 0; a < cc; ++a) {
                if (a * every + u < first || a * every + u >= last) continue;
                for (int64_t b = 0; b < cc; ++b) {
                    const int64_t element = turned ? b * cc + a : a * cc + b;
                    T value = 0;
                    for (int64_t sz = pair[0]->first; sz < pair[0]->last; ++sz)
                        for (int64_t sy = pair[1]->first; sy < pair[1]->last; ++sy)
                            for (int64_t sx = pair[2]->first; sx < pair[2]->last; ++sx)
                                value += sums[((from + (sz * ny + sy) * nx + sx) * cc * cc + element) * apart];
                    T& to = out[(a * every + u) * row_stride + (b * every + v) * col_stride];
                    to = beta == 0 ? alpha * value : beta * to + alpha * value;
                }
            }
        }
}

}  // namespace

template <class T>
void conv_by_lanes(const Convolution& x, double alpha, double beta, const GroupsOut& out, int threads) {
    const std::shared_ptr<const LanesPlan> plan = lanes_plan(x);
    const ConvKernels<T>& kernels = conv_kernels(tier_in_use(), T());
    const Lanes<T> work(x, *plan, kernels, threads);
    const int64_t size = int64_t(sizeof(T)), lanes_out = least(x.groups, work.width), features = x.channels * x.offsets();
    Carver each;
    const int64_t packed_at = each.take(work.packed_bytes()), flat_at = each.take(work.flat_elements() * size);
    const int64_t sums_each = work.by_strip ? work.sums * work.width : work.sums_elements();
    const int64_t sums_at = each.take(sums_each * size);
    Carver all;
    const int64_t each_at = all.take(each.used * threads);
    char* const base = workspace(all.used);

    parallel(threads, [&](int thread, int count) {
        const auto area = [&](int t) { return base + each_at + t * each.used; };
        const auto sums_of = [&](int t) { return reinterpret_cast<T*>(area(t) + sums_at); };
        T* const packed = reinterpret_cast<T*>(area(thread) + packed_at);
        T* const flat = reinterpret_cast<T*>(area(thread) + flat_at);
        // A strip's lanes are groups; those of several samples are added up first, into the lanes of the first sample.
        const auto finish = [&](int64_t strip, T* sums, int64_t first_row, int64_t last_row) {
            for (int64_t l = 0; l < least(lanes_out, x.groups - strip * work.width); ++l)
                write_rows(x, *plan, sums + l, work.width, first_row, last_row, T(alpha), T(beta),
                           static_cast<T*>(out.data) + (strip * work.width + l) * out.group_stride, out.row_stride, out.col_stride);
        };
        const auto fold = [&](T* sums, int64_t first, int64_t last) {
            if (work.fold == 1) return;
            for (T* to = sums + first * work.width; to < sums + last * work.width; to += work.width)
                for (int64_t l = x.groups; l < work.fold * x.groups; ++l) to[l % x.groups] += to[l];
        };
        const size_t per_strip = work.items.size() / size_t(work.strips);
        if (work.by_strip) {
            T* const own = sums_of(thread);
            for (int64_t strip = work.strips * thread / count; strip < work.strips * (thread + 1) / count; ++strip) {
                std::memset(own, 0, size_t(sums_each * size));
                for (size_t k = 0; k < per_strip; ++k) {
                    const Item& item = work.items[size_t(strip) * per_strip + k];
                    work.pack(item, packed, flat);
                    work.correlate(item, packed, own);
                }
                fold(own, 0, work.sums);
                finish(strip, own, 0, features);
            }
            return;
        }
        for (int worker = thread; worker < threads; worker += count) {  // with fewer threads, one does the work of several
            T* const own = sums_of(worker);
            std::memset(own, 0, size_t(sums_each * size));
            const size_t n = work.items.size();
            for (size_t at = n * size_t(worker) / size_t(threads); at < n * size_t(worker + 1) / size_t(threads); ++at) {
                work.pack(work.items[at], packed, flat);
                work.correlate(work.items[at], packed, own + work.items[at].strip * work.sums * work.width);
            }
        }
        barrier(count);
        const int64_t every = work.strips * work.sums, first = every * thread / count, last = every * (thread + 1) / count;
        T* const total = sums_of(0);
        for (int other = 1; other < threads; ++other) {
            const T* more = sums_of(other);
            for (int64_t e = first * work.width; e < last * work.width; ++e) total[e] += more[e];
        }
        fold(total, first, last);
        barrier(count);
        for (int64_t strip = 0; strip < work.strips; ++strip)
            finish(strip, total + strip * work.sums * work.width, features * thread / count, features * (thread + 1) / count);
    });
}

template void conv_by_lanes<float>(const Convolution&, double, double, const GroupsOut&, int);
template void conv_by_lanes<double>(const Convolution&, double, double, const GroupsOut&, int);

}  // namespace hvpfast

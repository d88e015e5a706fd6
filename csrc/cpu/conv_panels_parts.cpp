// Packing and assembly of the panel form (conv_panels.cpp).
#include <cstring>

#include "conv_panels.hpp"

namespace hvpfast {

std::vector<PixelRun> pixel_runs(const Convolution& x, const Images& images, const Band& band) {
    std::vector<PixelRun> runs;
    const int axis = images.plan.band_axis;
    const bool joined = x.stride[2] * x.space_stride[2] == 1;
    for (int64_t pz = 0; pz < x.stride[0]; ++pz)
        for (int64_t py = 0; py < x.stride[1]; ++py)
            for (int64_t px = 0; px < x.stride[2]; ++px)
                for (int64_t z = 0; z < images.extent(0, pz); ++z)
                    for (int64_t y = 0; y < images.extent(1, py); ++y) {
                        const int64_t at[3] = {z + (axis == 0 ? band.from : 0), y + (axis == 1 ? band.from : 0), axis == 2 ? band.from : 0};
                        const int64_t offset = (pz + at[0] * x.stride[0]) * x.space_stride[0] + (py + at[1] * x.stride[1]) * x.space_stride[1] +
                                               (px + at[2] * x.stride[2]) * x.space_stride[2];
                        const int64_t count = images.extent(2, px);
                        if (count == 0) continue;
                        if (joined && !runs.empty() && runs.back().offset + runs.back().count == offset) runs.back().count += count;
                        else runs.push_back({offset, count});
                    }
    return runs;
}

SumGroups::SumGroups(const OffsetPlan& plan, int64_t most_sums) : of_triple(plan.triples.size()), first(plan.triples.size()) {
    for (size_t t = 0; t < plan.triples.size(); ++t) {
        const OffsetTriple& one = plan.triples[t];
        if (!one.computed) continue;
        const int64_t both = one.sums * (one.reverse_is_self ? 1 : 2);
        if (sizes.empty() || sizes.back() + both > most_sums) sizes.push_back(0);
        for (const size_t which : {t, size_t(one.reverse)}) {
            of_triple[which] = count() - 1;
            first[which] = which == t ? sizes.back() : sizes.back() + one.sums;
        }
        first[t] = sizes.back();
        sizes.back() += both;
    }
}

int64_t SumGroups::largest() const {
    int64_t found = 0;
    for (const int64_t size : sizes) found = most(found, size);
    return found;
}

template <class T>
void PanelPacker<T>::pack(const Band& band, const Images& images, const std::vector<PixelRun>& runs, int64_t chunk, int64_t p, char* left,
                          char* right, T* stage, PackStats* stats) const {
    const int64_t lanes = kernels.lanes, panel = engine.panel, used = least(panel, x.channels - p * panel), pixels = images.pixels;
    const int64_t group = stage_pixels(chunk), step = x.stride[2] * x.space_stride[2];
    const bool beside = plain() && x.channel_stride == 1 && step != 1;  // channels are neighbours: nothing is to be turned
    T* const flat = stage;
    T* const held = stage + panel * group;
    if (!engine.one_form && band.samples < chunk) std::memset(held, 0, size_t(group * chunk * panel) * sizeof(T));  // samples not there
    const int64_t strip = engine.one_form ? engine.panel_bytes(pixels * chunk) / int64_t(sizeof(T)) / (panel / lanes) : lanes;
    int64_t apart[64], packed[64], beside_at[64];
    for (int64_t l = 0; l < panel; ++l) apart[l] = l * x.channel_stride, packed[l] = l * group, beside_at[l] = l;

    size_t run = 0;
    int64_t within = 0;  // pixels of this run that are packed
    for (int64_t pixel = 0; pixel < pixels;) {
        const bool straight = plain() && step == 1 && runs[run].count - within >= (engine.one_form ? 64 : least(group, pixels - pixel));
        const int64_t count = straight ? least(runs[run].count - within, engine.one_form ? pixels : group) : least(group, pixels - pixel);
        T* const to = engine.one_form ? reinterpret_cast<T*>(left) + pixel * chunk * lanes : held;
        const int64_t pitch = chunk * (engine.one_form ? lanes : panel);
        size_t next_run = run;
        int64_t next_within = within;
        for (int64_t b = 0; b < band.samples; ++b) {
            const int64_t offset = (band.first + b) * x.batch_stride + p * panel * x.channel_stride;
            T* const mine = to + b * (engine.one_form ? lanes : panel);
            next_run = run, next_within = within;
            if (straight) {
                const T* from = static_cast<const T*>(x.data) + offset + runs[run].offset + within;
                for (int64_t l = 0; l < used; l += lanes)
                    kernels.turn(from, apart + l, least(lanes, used - l), count, mine + l / lanes * strip, pitch);
                next_within += count;
                if (next_within == runs[next_run].count) ++next_run, next_within = 0;
                continue;
            }
            for (int64_t done = 0; done < count;) {  // run after run
                const int64_t n = least(count - done, runs[next_run].count - next_within);
                const int64_t at = offset + runs[next_run].offset + next_within * step;
                if (beside) {
                    for (int64_t q = 0; q < n; ++q)
                        for (int64_t l = 0; l < used; l += lanes)
                            kernels.turn(static_cast<const T*>(x.data) + at + q * step + l, beside_at, least(lanes, used - l), 1,
                                         mine + (done + q) * pitch + l / lanes * strip, pitch);
                } else {
                    for (int64_t l = 0; l < used; ++l) read_values(x, at + l * x.channel_stride, step, n, flat + l * group + done);
                }
                done += n;
                next_within += n;
                if (next_within == runs[next_run].count) ++next_run, next_within = 0;
            }
            if (!beside)
                for (int64_t l = 0; l < used; l += lanes)
                    kernels.turn(flat, packed + l, least(lanes, used - l), count, mine + l / lanes * strip, pitch);
        }
        run = next_run, within = next_within;
        if (!engine.one_form) {
            const int64_t at = engine.panel_bytes(pixel * chunk);
            engine.pack(Rows{held, Dtype::f32, 1, count * chunk, used, 0, panel, 1}, 0, count * chunk, 0, false, left + at, right + at, stats);
        }
        pixel += count;
    }
}

template <class T>
void PanelAssembly<T>::rows(const PanelTask& task, bool turned, const T* sums, T* row) const {
    const int64_t k1 = x.kernel[1], k2 = x.kernel[2], offsets = x.offsets(), square = panel * panel;
    const int64_t i = turned ? task.j : task.i, j = turned ? task.i : task.j;
    const int64_t ni = least(panel, x.channels - i * panel), nj = least(panel, x.channels - j * panel);
    const bool straight = beta == 0 && out.col_stride == 1;
    std::vector<const T*> sources;
    std::vector<int64_t> counts;
    struct Part {
        int64_t first, count, source, counted;
    };
    std::vector<Part> parts;  // neighbouring column offsets of this group
    for (int64_t a = 0; a < offsets; ++a) {
        sources.clear(), counts.clear(), parts.clear();
        const int64_t at_a[3] = {a / (k1 * k2), a / k2 % k1, a % k2};
        for (int64_t b = 0; b < offsets; ++b) {
            const int64_t at_b[3] = {b / (k1 * k2), b / k2 % k1, b % k2};
            const OffsetPair* pair[3];
            int64_t triple;
            if (turned) plan.of_pair(at_b, at_a, pair, &triple);
            else plan.of_pair(at_a, at_b, pair, &triple);
            if (groups.of_triple[size_t(triple)] != task.group) continue;
            if (parts.empty() || parts.back().first + parts.back().count != b)
                parts.push_back({b, 0, int64_t(sources.size()), int64_t(counts.size())});
            ++parts.back().count;
            const size_t before = sources.size();
            const OffsetTriple& one = plan.triples[size_t(triple)];
            const int64_t ny = plan.of(1, one.of_class[1]).segments(), nx = plan.of(2, one.of_class[2]).segments();
            for (int64_t sz = pair[0]->first; sz < pair[0]->last; ++sz)
                for (int64_t sy = pair[1]->first; sy < pair[1]->last; ++sy)
                    for (int64_t sx = pair[2]->first; sx < pair[2]->last; ++sx)
                        sources.push_back(sums + (groups.first[size_t(triple)] + (sz * ny + sy) * nx + sx) * square);
            counts.push_back(int64_t(sources.size() - before));
        }
        for (int64_t r = 0; r < ni; ++r) {
            T* const to = static_cast<T*>(out.data) + ((i * panel + r) * offsets + a) * out.row_stride + j * panel * offsets * out.col_stride;
            for (const Part& part : parts) {
                T* const base = straight ? to : row;
                kernels.weave(sources.data() + part.source, counts.data() + part.counted, part.count, r * panel, nj, alpha, base + part.first, offsets);
                if (straight) continue;
                for (int64_t c = 0; c < nj; ++c)
                    for (int64_t b = part.first; b < part.first + part.count; ++b) {
                        T& element = to[(c * offsets + b) * out.col_stride];
                        element = beta == 0 ? row[c * offsets + b] : beta * element + row[c * offsets + b];
                    }
            }
        }
    }
}

template <class T>
void PanelAssembly<T>::run(const PanelTask& task, T* sums, T* row) const {
    const int64_t square = panel * panel;
    if (task.i == task.j) {  // what was not computed is the transpose of what was
        for (size_t t = 0; t < plan.triples.size(); ++t) {
            const OffsetTriple& one = plan.triples[t];
            if (!one.computed || groups.of_triple[t] != task.group) continue;
            for (int64_t s = 0; s < one.sums; ++s) {
                T* const from = sums + (groups.first[t] + s) * square;
                if (!one.reverse_is_self) {
                    kernels.transpose(from, panel, sums + (groups.first[size_t(one.reverse)] + s) * square, panel, panel, panel);
                    continue;
                }
                for (int64_t r = 0; r < panel; ++r)  // symmetric to the bit
                    for (int64_t c = r + 1; c < panel; ++c) from[c * panel + r] = from[r * panel + c];
            }
        }
        rows(task, false, sums, row);
        return;
    }
    rows(task, false, sums, row);
    T* const held = row + panel * x.offsets();
    for (int64_t s = 0; s < groups.sizes[size_t(task.group)]; ++s) {
        std::memcpy(held, sums + s * square, size_t(square) * sizeof(T));
        kernels.transpose(held, panel, sums + s * square, panel, panel, panel);
    }
    rows(task, true, sums, row);
}

template struct PanelPacker<float>;
template struct PanelPacker<double>;
template struct PanelAssembly<float>;
template struct PanelAssembly<double>;

}  // namespace hvpfast

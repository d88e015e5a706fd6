// conv_gram as the Gram matrix of patches, upper triangle of panels only: where offsets have too little in common
// (kernel as large as the stride, few positions) and for kernel size 1, whose patches are pixels.
//
// Patches are packed a block of positions at a time, straight from the image: a feature (channel, kernel offset) of
// neighbouring positions is a run of neighbouring values. Where that is not so (padding, a stride along the last axis,
// 16-bit values) a thread keeps a padded copy, phase by phase, of the samples at hand, or of parts of them.
#include <cstring>
#include <vector>

#include "conv.hpp"
#include "tiers.hpp"
#include "triangle.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

template <class T>
struct Patches {
    const Convolution& x;
    int64_t position[3];             // along each axis, of one part
    int64_t parts = 1;               // of a sample, cut along its first axis of more than one position: bounds the copies
    int axis = 2;
    int64_t positions, run;          // of one part; neighbouring positions whose features lie side by side
    int64_t size = 0;                // elements of a copied sample, 0: none is made
    int64_t extent[3], lowest[3];    // of the copied phase images; the offset that begins first
    int64_t row_step[3];             // from one position to the next along each axis
    std::vector<int64_t> feature;    // where each feature of position 0 lies
    std::vector<int64_t> image_of[3];  // [axis][phase] -> number among the phases that occur, or -1

    // `most_bytes`: of the copies that a block of `depth` rows needs.
    Patches(const Convolution& of, int64_t depth, int64_t most_bytes) : x(of) {
        for (int d = 2; d >= 0; --d)
            if (x.positions[d] > 1) axis = d;
        for (int64_t shortest = x.positions[axis]; shortest >= 1; --shortest) {
            if (x.positions[axis] % shortest != 0) continue;
            parts = x.positions[axis] / shortest;
            cut();
            if (size * kept(depth) * int64_t(sizeof(T)) <= most_bytes) break;
        }
    }

    void cut() {
        for (int d = 0; d < 3; ++d) position[d] = x.positions[d] / (d == axis ? parts : 1);
        positions = position[0] * position[1] * position[2];
        run = position[2];
        size = 0;
        feature.clear();
        bool direct = x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32) && (x.positions[2] == 1 || x.stride[2] * x.space_stride[2] == 1);
        for (int d = 0; d < 3; ++d)
            direct = direct && x.before[d] == 0 && (x.positions[d] - 1) * x.stride[d] + (x.kernel[d] - 1) * x.dilation[d] < x.size[d];
        std::vector<int64_t> at[3];  // [axis][kernel offset]
        int64_t images[3] = {1, 1, 1};
        for (int d = 0; d < 3; ++d) {
            if (direct) {
                for (int64_t u = 0; u < x.kernel[d]; ++u) at[d].push_back(u * x.dilation[d] * x.space_stride[d]);
                row_step[d] = x.stride[d] * x.space_stride[d];
                continue;
            }
            image_of[d].assign(size_t(x.stride[d]), -1);
            int64_t highest = 0;
            lowest[d] = 0;
            images[d] = 0;
            std::vector<int64_t> start;
            for (int64_t u = 0; u < x.kernel[d]; ++u) {
                const int64_t where = u * x.dilation[d] - x.before[d];
                start.push_back(where >= 0 ? where / x.stride[d] : -ceil_div(-where, x.stride[d]));
                lowest[d] = u == 0 ? start[0] : least(lowest[d], start.back());
                highest = u == 0 ? start[0] : most(highest, start.back());
                int64_t& image = image_of[d][size_t(where - start.back() * x.stride[d])];
                if (image < 0) image = images[d]++;
            }
            extent[d] = position[d] + highest - lowest[d];
            for (int64_t u = 0; u < x.kernel[d]; ++u) {
                const int64_t where = u * x.dilation[d] - x.before[d];
                at[d].push_back(image_of[d][size_t(where - start[size_t(u)] * x.stride[d])] * extent[d] + start[size_t(u)] - lowest[d]);
            }
        }
        int64_t channel = x.channel_stride;
        if (!direct) {  // axis d of the copy: phase, then element
            const int64_t wide[3] = {images[0] * extent[0], images[1] * extent[1], images[2] * extent[2]};
            channel = wide[0] * wide[1] * wide[2];
            size = x.channels * channel;
            row_step[0] = wide[1] * wide[2], row_step[1] = wide[2], row_step[2] = 1;
            for (int64_t& one : at[0]) one *= row_step[0];
            for (int64_t& one : at[1]) one *= row_step[1];
        }
        for (int64_t c = 0; c < x.channels; ++c)
            for (const int64_t z : at[0])
                for (const int64_t y : at[1])
                    for (const int64_t one : at[2]) feature.push_back(c * channel + z + y + one);
        if (row_step[1] == position[2] * row_step[2] && row_step[2] == 1) {  // rows of positions are neighbours
            run *= position[1];
            if (row_step[0] == run) run *= position[0];
        }
    }

    int64_t features() const { return int64_t(feature.size()); }
    // Copied parts that a block of `depth` rows may touch.
    int64_t kept(int64_t depth) const { return size == 0 ? 0 : (depth + positions - 2) / positions + 1; }

    void copy(int64_t part, T* to) const {
        const int64_t n = part / parts;
        int64_t low[3] = {lowest[0], lowest[1], lowest[2]};  // element of a phase image that the copy begins with
        low[axis] += part % parts * position[axis];
        std::memset(to, 0, size_t(size) * sizeof(T));
        const int64_t channel = size / x.channels;
        for (int64_t c = 0; c < x.channels; ++c)
            for (int64_t z = 0; z < x.size[0]; ++z)
                for (int64_t y = 0; y < x.size[1]; ++y) {
                    const int64_t iz = image_of[0][size_t(z % x.stride[0])], iy = image_of[1][size_t(y % x.stride[1])];
                    const int64_t ez = z / x.stride[0] - low[0], ey = y / x.stride[1] - low[1];
                    if (iz < 0 || iy < 0 || ez < 0 || ey < 0 || ez >= extent[0] || ey >= extent[1]) continue;
                    T* const row = to + c * channel + (iz * extent[0] + ez) * row_step[0] + (iy * extent[1] + ey) * row_step[1];
                    const int64_t offset = n * x.batch_stride + c * x.channel_stride + z * x.space_stride[0] + y * x.space_stride[1];
                    for (int64_t phase = 0; phase < least(x.stride[2], x.size[2]); ++phase) {
                        if (image_of[2][size_t(phase)] < 0) continue;
                        const int64_t there = (x.size[2] - phase + x.stride[2] - 1) / x.stride[2];
                        const int64_t first = most(0, low[2]), last = least(there, extent[2] + low[2]);
                        if (first < last)
                            read_values(x, offset + (phase + first * x.stride[2]) * x.space_stride[2], x.stride[2] * x.space_stride[2], last - first,
                                        row + image_of[2][size_t(phase)] * extent[2] + first - low[2]);
                    }
                }
    }
};

// Packs patches [row, row + k), and keeps the copies of samples that it needs.
template <class T>
struct PatchReader {
    const Engine<T>& engine;
    const ConvKernels<T>& kernels;
    const Patches<T>& from;
    T* copies;
    T* stage;
    int64_t kept, next = -1;  // parts before `next` were copied

    const T* part(int64_t n) const {
        return from.size == 0 ? static_cast<const T*>(from.x.data) + n * from.x.batch_stride : copies + n % kept * from.size;
    }

    void prepare(int64_t row, int64_t k) {
        if (from.size == 0) return;
        for (int64_t n = most(next, row / from.positions); n <= (row + k - 1) / from.positions; ++n, next = n) from.copy(n, copies + n % kept * from.size);
    }

    void pack(int64_t row, int64_t k, int64_t p, char* left, char* right, PackStats* stats) const {
        const int64_t lanes = kernels.lanes, panel = engine.panel, used = least(panel, from.features() - p * panel);
        const int64_t strip = engine.one_form ? engine.panel_bytes(k) / int64_t(sizeof(T)) / (panel / lanes) : lanes;
        const int64_t pitch = engine.one_form ? lanes : panel;
        T* to = engine.one_form ? reinterpret_cast<T*>(left) : stage;
        for (int64_t done = 0; done < k;) {
            const int64_t n = (row + done) / from.positions, at = (row + done) % from.positions, along = at % from.run;
            const int64_t count = least(k - done, from.run - along), x0 = at % from.position[2], y = at / from.position[2];
            const T* const base = part(n) + y / from.position[1] * from.row_step[0] + y % from.position[1] * from.row_step[1] + x0 * from.row_step[2];
            for (int64_t l = 0; l < used; l += lanes)
                kernels.turn(base, from.feature.data() + p * panel + l, least(lanes, used - l), count, to + l / lanes * strip, pitch);
            done += count;
            to += count * pitch;
        }
        if (!engine.one_form) engine.pack(Rows{stage, Dtype::f32, 1, k, used, 0, panel, 1}, 0, k, 0, false, left, right, stats);
    }
};

}  // namespace

template <class T>
bool conv_by_patches(const Engine<T>& engine, const Convolution& x, double alpha, double beta, const Out& out, int threads) {
    const int64_t deepest = 256;
    const Patches<T> patches(x, deepest, most(int64_t(1) << 20, conv_memory(x, threads) / (2 * threads)));
    const ConvKernels<T>& kernels = conv_kernels(engine.tier, T());
    const Triangle shape{engine.panel, ceil_div(out.rows, engine.panel)};
    const int64_t rows = x.batch * patches.parts * patches.positions, features = shape.panels * engine.panel, size = int64_t(sizeof(T));
    const bool amx = engine.tier == Tier::amx;
    if (rows * features * features < (int64_t(1) << 20)) threads = 1;
    // Threads share the triangle, packing together, or each has rows and a triangle of its own.
    const bool share = threads > 1 && (features >= 1536 || (rows <= 1024 && shape.squares() >= 3 * threads));
    if (!share) threads = int(least(threads, ceil_div(rows, 64)));
    const int64_t own = share ? rows : ceil_div(rows, threads);
    const int64_t depth = ceil_div(ceil_div(own, ceil_div(own, deepest)), engine.k_align) * engine.k_align;
    const int64_t square = engine.panel * engine.panel;
    int64_t side = 1;  // panels along the side of a part of the triangle, which stays in L2 with its operands
    while ((side + 1) * ((side + 1) * square * size + 2 * engine.panel_bytes(depth)) <= l2_bytes() * 7 / 10) ++side;
    const int64_t groups = share ? 1 : threads, forms = engine.one_form ? 1 : 2, form = shape.panels * engine.panel_bytes(depth);
    const int64_t kept = patches.kept(depth);

    Carver carver;
    const int64_t sums_at = carver.take(groups * shape.elements() * size), low_at = carver.take(amx ? groups * features * 4 : 0);
    const int64_t seen_at = carver.take(threads * 4), packed_at = carver.take(form * forms * (share ? 2 : groups));
    const int64_t copies_each = (kept * patches.size * size + 63) / 64 * 64, copies_at = carver.take(copies_each * threads);
    const int64_t stage_each = amx ? depth * engine.panel * size : 0, stage_at = carver.take(stage_each * threads);
    const int64_t patch = shape.patch_elements(size), turned_at = carver.take(threads * patch * size);
    char* const base = workspace(carver.used);
    T* const sums = reinterpret_cast<T*>(base + sums_at);
    float* const low = amx ? reinterpret_cast<float*>(base + low_at) : nullptr;
    uint32_t* const seen = reinterpret_cast<uint32_t*>(base + seen_at);
    if (amx)
        for (int64_t f = 0; f < groups * features; ++f) low[f] = 0;

    bool fits = true;
    parallel(threads, [&](int index, int count) {
        PackStats stats;
        engine.begin();
        const int64_t total = shape.squares();
        const int64_t mine_first = share ? total * index / count : 0, mine_last = share ? total * (index + 1) / count : total;
        for (int64_t group = share ? 0 : index; group < groups; group += share ? 1 : count) {
            PatchReader<T> reader{engine, kernels, patches, reinterpret_cast<T*>(base + copies_at + index * copies_each),
                                  reinterpret_cast<T*>(base + stage_at + index * stage_each), kept};
            const int64_t row_first = share ? 0 : rows * group / groups, row_last = share ? rows : rows * (group + 1) / groups;
            T* const c = sums + group * shape.elements();
            int64_t parity = 0;
            for (int64_t row = row_first; row < row_last; row += depth, parity ^= 1) {
                const int64_t k = least(depth, row_last - row), bytes = engine.panel_bytes(k);
                const Mode mode = row == row_first ? Mode::store : Mode::add;
                char* const a = base + packed_at + (share ? parity : group) * form * forms;
                char* const b = engine.one_form ? a : a + form;
                reader.prepare(row, k);
                for (int64_t p = share ? shape.panels * index / count : 0; p < (share ? shape.panels * (index + 1) / count : shape.panels); ++p) {
                    if (amx) stats.low_squares = low + group * features + p * engine.panel;
                    reader.pack(row, k, p, a + p * bytes, b + p * bytes, &stats);
                }
                if (share) barrier(count);
                int64_t at = 0;  // a thread owns squares [mine_first, mine_last), counted in this order
                for (int64_t i0 = 0; i0 < shape.panels; i0 += side)
                    for (int64_t j0 = i0; j0 < shape.panels; j0 += side)
                        for (int64_t j = j0; j < least(shape.panels, j0 + side); ++j) {
                            const int64_t nj = least(engine.panel, out.cols - j * engine.panel), i_last = least(i0 + side, j + 1);
                            for (int64_t i = i0; i < i_last; ++i, ++at) {
                                if (at < mine_first || at >= mine_last) continue;
                                T* const to = c + shape.at(i, j);
                                const Ahead soon{i + 1 < i_last ? to + square : nullptr, nullptr, 0};
                                engine.block(mode, a + i * bytes, b + j * bytes, least(engine.panel, out.rows - i * engine.panel), nj, k, i == j, to,
                                             &soon);
                            }
                        }
            }
        }
        engine.end();
        seen[index] = stats.largest;
        barrier(count);
        uint32_t largest = 0;
        for (int t = 0; t < count; ++t) largest = seen[t] > largest ? seen[t] : largest;
        if (amx && !bf16_holds(largest)) {
            if (index == 0) fits = false;
            return;
        }
        mirror_squares<T>(shape, index, count, sums, groups, shape.elements(), low, groups, alpha, beta, out,
                          reinterpret_cast<T*>(base + turned_at) + index * patch);
    });
    return fits;
}

template bool conv_by_patches<float>(const Engine<float>&, const Convolution&, double, double, const Out&, int);
template bool conv_by_patches<double>(const Engine<double>&, const Convolution&, double, double, const Out&, int);

}  // namespace hvpfast

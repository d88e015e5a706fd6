// conv_gram: the Gram matrix of a convolution's patches, by offsets (offsets.hpp): no patch is ever formed. A 3 x 3
// convolution at stride 1 takes 13 correlations of C x C instead of 81 blocks.
//
// A batch chunk is packed [panel of channels][phase image][pixel][sample]: a shift by one pixel is a shift by a chunk
// of packed rows, so the same packing serves every offset. Threads take chunks, each with its own sums (one C x C
// per class of pairs and segment); the sums are added in thread order and the blocks assembled from them.
#include <cstring>
#include <vector>

#include "batch.hpp"
#include "offsets.hpp"
#include "scalar.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

// Packed rows that one walk sums, where the image has as many: sums begin at zero, and short ones cost more additions.
template <class T>
int64_t run_length(const Engine<T>& engine) { return engine.one_form ? 512 : 1024; }

// One class of offset pairs on all axes, of which only one of (u, v) and (v, u) is computed.
struct Correlation {
    int64_t of_class[3];
    bool symmetric;  // its own reverse: only squares on and above the diagonal are computed
    int64_t first_sum;
};

struct Plan {
    std::vector<OffsetAxis> axes;
    std::vector<Correlation> correlations;
    std::vector<int64_t> index;  // [class z][class y][class x] -> correlation, or -1 if its reverse is computed
    int64_t sums = 0;            // C x C sums, over all correlations and segments

    explicit Plan(const Convolution& x) {
        for (int d = 0; d < 3; ++d)
            axes.emplace_back(x.size[d], x.kernel[d], x.stride[d], x.dilation[d], x.before[d], x.positions[d]);
        int64_t id[3];
        for (id[0] = 0; id[0] < count(0); ++id[0])
            for (id[1] = 0; id[1] < count(1); ++id[1])
                for (id[2] = 0; id[2] < count(2); ++id[2]) {
                    int order = 0;  // of this triple against its reverse
                    for (int d = 0; d < 3 && order == 0; ++d) {
                        const int64_t reverse = axes[size_t(d)].classes[size_t(id[d])].reverse;
                        order = id[d] < reverse ? -1 : id[d] > reverse;
                    }
                    index.push_back(order > 0 ? -1 : int64_t(correlations.size()));
                    if (order > 0) continue;
                    correlations.push_back({{id[0], id[1], id[2]}, order == 0, sums});
                    sums += of(0, id[0]).segments() * of(1, id[1]).segments() * of(2, id[2]).segments();
                }
    }
    int64_t count(int d) const { return int64_t(axes[size_t(d)].classes.size()); }
    const OffsetClass& of(int d, int64_t one) const { return axes[size_t(d)].classes[size_t(one)]; }
};

// Where the packed pixels of each phase image begin.
struct Images {
    const Plan& plan;
    std::vector<int64_t> first;
    explicit Images(const Plan& of) : plan(of) {
        int64_t at = 0;
        for (int64_t z = 0; z < stride(0); ++z)
            for (int64_t y = 0; y < stride(1); ++y)
                for (int64_t x = 0; x < stride(2); ++x) {
                    first.push_back(at);
                    at += extent(0, z) * extent(1, y) * extent(2, x);
                }
    }
    int64_t stride(int d) const { return plan.axes[size_t(d)].stride; }
    int64_t extent(int d, int64_t phase) const { return plan.axes[size_t(d)].phase_size(phase); }
    int64_t start(int64_t z, int64_t y, int64_t x) const { return first[size_t((z * stride(1) + y) * stride(2) + x)]; }
};

double value_at(const Convolution& x, int64_t offset) {
    switch (x.dtype) {
        case Dtype::f32: return static_cast<const float*>(x.data)[offset];
        case Dtype::f64: return static_cast<const double*>(x.data)[offset];
        case Dtype::bf16: return bf16_to_float(static_cast<const uint16_t*>(x.data)[offset]);
        default: return f16_to_float(static_cast<const uint16_t*>(x.data)[offset]);
    }
}

// One channel of one sample, its pixels in packed order (phase image after phase image).
template <class T>
void flatten(const Convolution& x, const Images& images, int64_t offset, T* to) {
    for (int64_t pz = 0; pz < x.stride[0]; ++pz)
        for (int64_t py = 0; py < x.stride[1]; ++py)
            for (int64_t px = 0; px < x.stride[2]; ++px)
                for (int64_t z = pz; z < x.size[0]; z += x.stride[0])
                    for (int64_t y = py; y < x.size[1]; y += x.stride[1]) {
                        const int64_t row = offset + z * x.space_stride[0] + y * x.space_stride[1] + px * x.space_stride[2];
                        const int64_t count = images.extent(2, px), step = x.stride[2] * x.space_stride[2];
                        if (x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32)) {
                            const T* from = static_cast<const T*>(x.data) + row;
                            for (int64_t q = 0; q < count; ++q) to[q] = from[q * step];
                        } else {
                            for (int64_t q = 0; q < count; ++q) to[q] = T(value_at(x, row + q * step));
                        }
                        to += count;
                    }
}

template <class T>
struct Packer {
    const Engine<T>& engine;
    const Engine<T>& vector;  // turns pixels into rows
    const Convolution& x;
    const Images& images;
    int64_t chunk;  // samples, as packed
    bool flat;      // a channel's pixels lie in packed order already
    int64_t stage_pixels() const { return most(1, 2048 / chunk); }
    int64_t flat_elements() const { return engine.panel * x.pixels(); }
    int64_t stage_elements() const { return engine.one_form ? 0 : least(stage_pixels(), x.pixels()) * chunk * engine.panel; }

    // Samples [n0, n0 + n) of panel p. The staging area of a padded chunk is zeroed by the caller.
    void pack(int64_t n0, int64_t n, int64_t p, char* left, char* right, T* flattened, T* stage, PackStats* stats) const {
        const int64_t pixels = x.pixels(), panel = engine.panel, lanes = least(panel, x.channels - p * panel);
        const int64_t group = engine.one_form ? pixels : stage_pixels();
        for (int64_t pixel = 0; pixel < pixels; pixel += group) {
            const int64_t count = least(group, pixels - pixel);
            for (int64_t b = 0; b < n; ++b) {
                const int64_t offset = (n0 + b) * x.batch_stride + p * panel * x.channel_stride;
                const T* from = static_cast<const T*>(x.data) + offset;
                int64_t apart = x.channel_stride;
                if (!flat) {  // AMX packs the same sample group after group: flatten once a sample then
                    T* mine = flattened + (engine.one_form ? 0 : b * flat_elements());
                    if (pixel == 0)
                        for (int64_t lane = 0; lane < lanes; ++lane) flatten(x, images, offset + lane * x.channel_stride, mine + lane * pixels);
                    from = mine;
                    apart = pixels;
                }
                if (engine.one_form) {
                    const int64_t strip = panel / 3, stride = engine.panel_bytes(pixels * chunk) / 3 / int64_t(sizeof(T));
                    for (int64_t s = 0; s * strip < lanes; ++s)
                        engine.turn(from + s * strip * apart, apart, least(strip, lanes - s * strip), pixels,
                                    reinterpret_cast<T*>(left) + s * stride + b * strip, chunk * strip);
                } else {
                    vector.turn(from + pixel, apart, lanes, count, stage + b * panel, chunk * panel);
                }
            }
            if (!engine.one_form) {
                const int64_t at = engine.panel_bytes(pixel * chunk);
                engine.pack(Rows{stage, Dtype::f32, 1, count * chunk, lanes, 0, panel, 1}, 0, count * chunk, 0, false, left + at, right + at,
                            stats);
            }
        }
    }
};

// All products of one packed chunk, added to `sums`. Row blocks of the image are outermost, to stay in L2.
template <class T>
void correlate(const Engine<T>& engine, const Plan& plan, const Images& images, int64_t channels, int64_t chunk, int64_t pixels,
               const char* left, const char* right, T* sums) {
    const int64_t panels = ceil_div(channels, engine.panel), square = engine.panel * engine.panel;
    const int64_t bytes = engine.panel_bytes(pixels * chunk);
    const int64_t longest[3] = {plan.axes[0].longest(), plan.axes[1].longest(), plan.axes[2].longest()};
    const int64_t x_step = least(longest[2], most(1, 2 * run_length(engine) / chunk));
    const int64_t y_step = most(1, run_length(engine) / (x_step * chunk));
    for (int64_t z = 0; z < longest[0]; ++z)
        for (int64_t yb = 0; yb < longest[1]; yb += y_step)
            for (int64_t xb = 0; xb < longest[2]; xb += x_step)
                for (const Correlation& one : plan.correlations) {
                    const OffsetClass& cz = plan.of(0, one.of_class[0]);
                    const OffsetClass& cy = plan.of(1, one.of_class[1]);
                    const OffsetClass& cx = plan.of(2, one.of_class[2]);
                    const int64_t ly = images.extent(1, cy.left_phase), lx = images.extent(2, cx.left_phase);
                    const int64_t ry = images.extent(1, cy.right_phase), rx = images.extent(2, cx.right_phase);
                    int64_t sum = one.first_sum;
                    for (int64_t sz = 0; sz < cz.segments(); ++sz)
                        for (int64_t sy = 0; sy < cy.segments(); ++sy)
                            for (int64_t sx = 0; sx < cx.segments(); ++sx, ++sum) {
                                if (!cz.used[size_t(sz)] || !cy.used[size_t(sy)] || !cx.used[size_t(sx)]) continue;
                                if (z < cz.cuts[size_t(sz)] || z >= cz.cuts[size_t(sz) + 1]) continue;
                                const int64_t y0 = most(yb, cy.cuts[size_t(sy)]), y1 = least(yb + y_step, cy.cuts[size_t(sy) + 1]);
                                const int64_t x0 = most(xb, cx.cuts[size_t(sx)]), x1 = least(xb + x_step, cx.cuts[size_t(sx) + 1]);
                                if (y0 >= y1 || x0 >= x1) continue;
                                const int64_t a = images.start(cz.left_phase, cy.left_phase, cx.left_phase) + (z * ly + y0) * lx + x0;
                                const int64_t b = images.start(cz.right_phase, cy.right_phase, cx.right_phase) +
                                                  ((z + cz.shift) * ry + y0 + cy.shift) * rx + x0 + cx.shift;
                                const Walk over{(x1 - x0) * chunk, y1 - y0, lx * chunk, rx * chunk, pixels * chunk};
                                for (int64_t j = 0; j < panels; ++j)
                                    for (int64_t i = 0; i < (one.symmetric ? j + 1 : panels); ++i)
                                        engine.walk(left + i * bytes, right + j * bytes, a * chunk, b * chunk,
                                                    least(engine.panel, channels - i * engine.panel),
                                                    least(engine.panel, channels - j * engine.panel), over,
                                                    sums + ((sum * panels + i) * panels + j) * square);
                            }
                }
}

// Assembles the patch Gram matrix from the sums, a square of `cell` x `cell` channels (all their offsets) at a time.
template <class T, int64_t cell>
struct Assembly {
    const Plan& plan;
    const Convolution& x;
    const T* sums;
    int64_t panel, panels;
    int64_t cells() const { return ceil_div(x.channels, cell); }
    int64_t width() const { return cell * x.offsets(); }

    // held (cell x cell) = sum over the pair's segments of channels (i, j); i, j: first channels.
    void gather(const Correlation& one, const OffsetPair* const pair[3], int64_t i, int64_t j, T* held) const {
        const bool turned = one.symmetric && i > j;  // the result is symmetric to the bit: read above the diagonal
        const int64_t r = turned ? j : i, c = turned ? i : j;
        for (int64_t e = 0; e < cell * cell; ++e) held[e] = 0;
        const int64_t ny = plan.of(1, one.of_class[1]).segments(), nx = plan.of(2, one.of_class[2]).segments();
        for (int64_t sz = pair[0]->first; sz < pair[0]->last; ++sz)
            for (int64_t sy = pair[1]->first; sy < pair[1]->last; ++sy)
                for (int64_t sx = pair[2]->first; sx < pair[2]->last; ++sx) {
                    const int64_t sum = one.first_sum + (sz * ny + sy) * nx + sx;
                    const T* from = sums + ((sum * panels + r / panel) * panels + c / panel) * panel * panel + r % panel * panel + c % panel;
                    for (int64_t row = 0; row < cell; ++row)
                        for (int64_t col = 0; col < cell; ++col) held[row * cell + col] += from[row * panel + col];
                }
        if (turned)
            for (int64_t row = 0; row < cell; ++row)
                for (int64_t col = row + 1; col < cell; ++col) {
                    const T value = held[row * cell + col];
                    held[row * cell + col] = held[col * cell + row];
                    held[col * cell + row] = value;
                }
        else if (one.symmetric && i == j)
            for (int64_t row = 0; row < cell; ++row)
                for (int64_t col = row + 1; col < cell; ++col) held[col * cell + row] = held[row * cell + col];
    }

    void region(int64_t i, int64_t j, T* buffer, T* held) const {
        const int64_t k1 = x.kernel[1], k2 = x.kernel[2], offsets = x.offsets(), wide = width();
        for (int64_t u = 0; u < offsets; ++u)
            for (int64_t v = 0; v < offsets; ++v) {
                const int64_t at_u[3] = {u / (k1 * k2), u / k2 % k1, u % k2}, at_v[3] = {v / (k1 * k2), v / k2 % k1, v % k2};
                const OffsetPair *pair[3], *back[3];
                int64_t index = 0;
                for (int d = 0; d < 3; ++d) {
                    const OffsetAxis& axis = plan.axes[size_t(d)];
                    pair[d] = &axis.pairs[size_t(at_u[d] * axis.kernel + at_v[d])];
                    back[d] = &axis.pairs[size_t(at_v[d] * axis.kernel + at_u[d])];
                    index = index * plan.count(d) + pair[d]->of_class;
                }
                T* to = buffer + u * wide + v;
                if (plan.index[size_t(index)] >= 0) {
                    gather(plan.correlations[size_t(plan.index[size_t(index)])], pair, i, j, held);
                    for (int64_t r = 0; r < cell; ++r)
                        for (int64_t c = 0; c < cell; ++c) to[r * offsets * wide + c * offsets] = held[r * cell + c];
                } else {  // block (v, u) was computed: this one is its transpose
                    index = 0;
                    for (int d = 0; d < 3; ++d) index = index * plan.count(d) + back[d]->of_class;
                    gather(plan.correlations[size_t(plan.index[size_t(index)])], back, j, i, held);
                    for (int64_t r = 0; r < cell; ++r)
                        for (int64_t c = 0; c < cell; ++c) to[r * offsets * wide + c * offsets] = held[c * cell + r];
                }
            }
    }

    void write(int64_t i, int64_t j, const T* buffer, T alpha, T beta, const Out& out) const {
        const int64_t rows = least(width(), out.rows - i * x.offsets()), cols = least(width(), out.cols - j * x.offsets());
        T* const base = static_cast<T*>(out.data);
        for (int64_t r = 0; r < rows; ++r) {
            const T* from = buffer + r * width();
            T* to = base + (i * x.offsets() + r) * out.row_stride + j * x.offsets() * out.col_stride;
            if (beta == 0 && out.col_stride == 1)
                for (int64_t c = 0; c < cols; ++c) to[c] = alpha * from[c];
            else
                for (int64_t c = 0; c < cols; ++c, to += out.col_stride) *to = beta == 0 ? alpha * from[c] : beta * *to + alpha * from[c];
        }
        if (i == j) return;
        for (int64_t c0 = 0; c0 < cols; c0 += 16)  // the mirror image, 16 of its rows at a time
            for (int64_t r = 0; r < rows; ++r) {
                const T* from = buffer + r * width();
                T* to = base + (j * x.offsets() + c0) * out.row_stride + (i * x.offsets() + r) * out.col_stride;
                for (int64_t c = c0; c < least(cols, c0 + 16); ++c, to += out.row_stride)
                    *to = beta == 0 ? alpha * from[c] : beta * *to + alpha * from[c];
            }
    }

    // Squares `index`, `index` + `count`, ... of those on and above the diagonal.
    void run(int index, int count, T* buffer, T alpha, T beta, const Out& out) const {
        int64_t one = 0;
        for (int64_t j = 0; j < cells(); ++j)
            for (int64_t i = 0; i <= j; ++i, ++one) {
                if (one % count != index) continue;
                region(i * cell, j * cell, buffer, buffer + width() * width());
                write(i * cell, j * cell, buffer, alpha, beta, out);
            }
    }
};

// Channels of an assembled square: they divide the panel, and the square stays in L2.
int64_t cell_channels(int64_t panel, int64_t offsets) {
    int64_t cell = 16;
    while (panel % cell != 0 || (cell > 1 && cell * offsets > 256)) cell /= 2;
    return cell;
}

template <class T, int64_t cell>
void assemble(const Plan& plan, const Convolution& x, const T* sums, int64_t panel, int index, int count, T* buffer, T alpha, T beta,
              const Out& out) {
    if constexpr (cell > 1)
        if (cell_channels(panel, x.offsets()) < cell)
            return assemble<T, cell / 2>(plan, x, sums, panel, index, count, buffer, alpha, beta, out);
    Assembly<T, cell>{plan, x, sums, panel, ceil_div(x.channels, panel)}.run(index, count, buffer, alpha, beta, out);
}

// False if a reduced-precision engine met values outside its range: out is untouched then.
template <class T>
bool conv_with(const Engine<T>& engine, const Engine<T>& vector, const Convolution& x, double alpha, double beta, const Out& out,
               int threads) {
    const Plan plan(x);
    const Images images(plan);
    const int64_t panels = ceil_div(x.channels, engine.panel), pixels = x.pixels();
    const int64_t sums_size = plan.sums * panels * panels * engine.panel * engine.panel;
    int64_t chunk = engine.k_align;
    if (engine.one_form) {
        chunk = most(1, l2_bytes() / 2 / (pixels * panels * engine.panel * int64_t(sizeof(T))));
        chunk = least(least(chunk, 64), ceil_div(x.batch, threads));
    }
    const int64_t chunks = ceil_div(x.batch, chunk);
    threads = int(least(threads, chunks));
    while (threads > 1 && threads * sums_size * int64_t(sizeof(T)) > kWorkspaceBound) --threads;
    bool flat = x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32) && x.stride[0] * x.stride[1] * x.stride[2] == 1;
    for (int d = 2, step = 1; d >= 0; step *= int(x.size[d]), --d) flat = flat && (x.size[d] == 1 || x.space_stride[d] == step);
    const Packer<T> packer{engine, vector, x, images, chunk, flat};

    const int64_t cell = cell_channels(engine.panel, x.offsets()), wide = cell * x.offsets();

    const int64_t form = panels * engine.panel_bytes(pixels * chunk), size = int64_t(sizeof(T));
    Carver each;
    const int64_t left_at = each.take(form), right_at = each.take(engine.one_form ? 0 : form);
    const int64_t flat_at = each.take(flat ? 0 : packer.flat_elements() * (engine.one_form ? 1 : chunk) * size);
    const int64_t stage_at = each.take(packer.stage_elements() * size);
    const int64_t region_at = each.take((wide * wide + cell * cell) * size);
    Carver all;
    const int64_t sums_at = all.take(sums_size * threads * size), seen_at = all.take(threads * 4), each_at = all.take(each.used * threads);
    char* const base = workspace(all.used);
    T* const sums = reinterpret_cast<T*>(base + sums_at);
    uint32_t* const seen = reinterpret_cast<uint32_t*>(base + seen_at);

    bool fits = true;
    parallel(threads, [&](int index, int count) {
        char* const mine = base + each_at + index * each.used;
        char *const left = mine + left_at, *const right = engine.one_form ? left : mine + right_at;
        T *const stage = reinterpret_cast<T*>(mine + stage_at), *const region = reinterpret_cast<T*>(mine + region_at);
        T* const own = sums + index * sums_size;
        std::memset(own, 0, size_t(sums_size * size));
        PackStats stats;
        engine.begin();
        for (int64_t at = chunks * index / count; at < chunks * (index + 1) / count; ++at) {
            const int64_t n0 = at * chunk, n = least(chunk, x.batch - n0);
            if (n < chunk) {  // the samples that are not there are zero
                if (engine.one_form) std::memset(left, 0, size_t(form));
                else std::memset(stage, 0, size_t(packer.stage_elements() * size));
            }
            for (int64_t p = 0; p < panels; ++p)
                packer.pack(n0, n, p, left + p * engine.panel_bytes(pixels * chunk), right + p * engine.panel_bytes(pixels * chunk),
                            reinterpret_cast<T*>(mine + flat_at), stage, &stats);
            correlate(engine, plan, images, x.channels, chunk, pixels, left, right, own);
        }
        engine.end();
        seen[index] = stats.largest;
        barrier(count);
        uint32_t largest = 0;
        for (int t = 0; t < count; ++t) largest = seen[t] > largest ? seen[t] : largest;
        if (engine.tier == Tier::amx && !bf16_holds(largest)) {
            if (index == 0) fits = false;
            return;
        }
        for (int t = 1; t < count; ++t) {
            const T* other = sums + t * sums_size;
            for (int64_t e = sums_size * index / count; e < sums_size * (index + 1) / count; ++e) sums[e] += other[e];
        }
        barrier(count);
        assemble<T, 16>(plan, x, sums, engine.panel, index, count, region, T(alpha), T(beta), out);
    });
    return fits;
}

}  // namespace

void conv_gram(const Convolution& x, double alpha, double beta, const Out& out, Precision precision, int threads) {
    if (!threads_allowed || threads < 1) threads = 1;
    const Tier tier = tier_in_use();
    if (x.dtype == Dtype::f64) {
        conv_with(engine_f64(tier), engine_f64(tier), x, alpha, beta, out, threads);
        return;
    }
    const Engine<float>& vector = engine_f32(tier);
    if (tier == Tier::amx && x.dtype != Dtype::f16) {
        if (precision == Precision::automatic) precision = Precision::bf16x3;
        const Engine<float>* amx = engine_amx(precision, x.dtype);
        const int64_t chunk = 32 * x.pixels() * ceil_div(x.channels, 32) * 32 * 8;
        const bool fits = x.batch >= 16 && x.channels >= 16 && chunk * threads <= kWorkspaceBound;
        if (amx != nullptr && fits && conv_with(*amx, vector, x, alpha, beta, out, threads)) return;
    }
    conv_with(vector, vector, x, alpha, beta, out, threads);
}

}  // namespace hvpfast

// matmul: x w + bias in bf16x3 on AMX, of packed panels (engine.hpp).
//
// w is packed once for all threads, as many of its columns at a time as a last-level cache holds; each thread packs a few panels
// of its rows of x, which stay in its L2 while w's panels pass.
#include <algorithm>
#include <vector>

#include "batch.hpp"
#include "engine.hpp"
#include "kernels.hpp"
#include "rowwise.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace hvpfast {

bool matmul(const Rows& x, const Rows& w, const float* bias, const Out& out, int threads) {
    const Engine<float>* const found = engine_amx(Precision::bf16x3, Dtype::f32);
    if (tier_in_use() != Tier::amx || found == nullptr) return false;
    if (!threads_allowed || threads < 1) threads = 1;
    const Engine<float>& engine = *found;
    const Rowwise<float>& rowwise = rowwise_f32(Tier::amx);
    const int64_t panel = engine.panel, square = panel * panel, depth = x.rows();
    const Packed<float> all(engine, out.rows, depth);
    const int64_t of_depth = all.slice_bytes() / most(1, all.panels);  // bytes of a panel, a slice deep
    const int64_t chunk = least(ceil_div(out.cols, panel), most(1, (int64_t(32) << 20) / (of_depth * most(1, all.slices)))) * panel;
    const Packed<float> widest(engine, chunk, depth);
    const int64_t sums = all.slices == 1 ? square * 4 : widest.panels * square * 4;  // of a panel of rows
    const int64_t together = most(1, least(ceil_div(all.panels, int64_t(threads)), l2_bytes() / 2 / (of_depth + (all.slices == 1 ? 0 : sums))));
    const int64_t jobs = ceil_div(all.panels, together);
    if (jobs < threads) threads = int(most(1, jobs));
    Carver carver;
    const int64_t packed_at = carver.take(together * of_depth), sums_at = carver.take(all.slices == 1 ? sums : together * sums);
    const int64_t each = carver.used, shared = widest.bytes();
    char* const base = workspace(shared + each * threads);
    std::vector<PackStats> of_x(size_t(threads), PackStats{}), of_w(size_t(threads), PackStats{});
    parallel(threads, [&](int index, int count) {
        char* const left = base + shared + index * each + packed_at;
        float* const held = reinterpret_cast<float*>(base + shared + index * each + sums_at);
        engine.begin();
        for (int64_t begin = 0; begin < out.cols; begin += chunk) {
            const Packed<float> right(engine, least(chunk, out.cols - begin), depth);
            Rows columns = w;
            columns.data = at_element(w.data, w.dtype, begin * w.col_stride);
            columns.cols = right.features;
            barrier(count);
            for (int64_t p = index; p < right.panels; p += count)
                for (int64_t s = 0; s < right.slices; ++s)
                    engine.pack(columns, s * right.deepest, right.depth(s), p, false, nullptr,
                                base + s * right.slice_bytes() + p * engine.panel_bytes(right.depth(s)), &of_w[size_t(index)]);
            barrier(count);
            for (int64_t job = jobs * index / count; job < jobs * (index + 1) / count; ++job) {
                const int64_t first = job * together, last = least(all.panels, first + together);
                for (int64_t s = 0; s < all.slices; ++s) {
                    const int64_t bytes = engine.panel_bytes(all.depth(s));
                    for (int64_t p = first; p < last; ++p)
                        engine.pack(x, s * all.deepest, all.depth(s), p, false, left + (p - first) * bytes, nullptr, &of_x[size_t(index)]);
                    for (int64_t q = 0; q < right.panels; ++q)
                        for (int64_t p = first; p < last; ++p) {
                            float* const c = all.slices == 1 ? held : held + ((p - first) * widest.panels + q) * square;
                            if (s == 0 && bias != nullptr)
                                for (int64_t r = 0; r < panel; ++r) std::copy_n(bias + begin + q * panel, right.width(q), c + r * panel);
                            engine.block(s == 0 && bias == nullptr ? Mode::store : Mode::add, left + (p - first) * bytes, right.at(base, s, q),
                                         all.width(p), right.width(q), all.depth(s), false, c, nullptr);
                            if (s + 1 == all.slices)
                                rowwise.copy(c, panel, all.width(p), right.width(q), static_cast<float*>(out.data) + p * panel * out.row_stride + begin + q * panel,
                                             out.row_stride, false);
                        }
                }
            }
        }
        engine.end();
    });
    uint32_t values = 0, weights = 0;
    for (int t = 0; t < threads; ++t) {
        values = std::max(values, of_x[size_t(t)].largest);
        weights = std::max(weights, of_w[size_t(t)].largest);
    }
    return bf16_holds(values, weights);
}

}  // namespace hvpfast

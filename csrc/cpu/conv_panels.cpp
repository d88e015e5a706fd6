// conv_gram by offsets in panels of channels: no patch is ever formed. A 3 x 3 convolution at stride 1 takes 13
// correlations of C x C instead of 81 blocks.
//
// A band of a batch is packed [panel of channels][phase image][pixel][sample]: a shift by one pixel is a shift by a
// chunk of packed rows, so the same packing serves every offset. Many channels: bands are packed together, and each
// thread owns pairs of panels, whose sums are turned into blocks of the result while they are in its cache. Few
// channels: each thread sums all pairs over its own bands, and the sums are added in thread order.
#include <algorithm>
#include <cstring>
#include <vector>

#include "conv_panels.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

// Packed rows that one walk sums, where the image has as many: sums begin at zero, and short ones cost more additions.
template <class T>
int64_t run_length(const Engine<T>& engine) { return engine.one_form ? 512 : 1024; }

struct Item {
    Band band;
    int64_t chunk;  // samples, as packed
    Images images;
    std::vector<PixelRun> runs;
    int64_t bytes, at;  // of one form of all panels; where it begins in the packed memory
};

template <class T>
struct Panels {
    const Engine<T>& engine;
    const ConvKernels<T>& kernels;
    const Convolution& x;
    const OffsetPlan& plan;
    int threads;
    int64_t panels, square, forms;
    bool split;  // threads have bands of their own, and sums of all pairs
    std::vector<Item> items;
    std::vector<PanelTask> tasks;
    std::vector<size_t> rounds;  // items [rounds[r], rounds[r + 1]) are packed at one time
    SumGroups groups;

    static int64_t most_sums(const OffsetPlan&, int64_t square) { return most(1, (int64_t(4) << 20) / (square * int64_t(sizeof(T)))); }

    Panels(const Engine<T>& with, const Convolution& of, const OffsetPlan& by, int count)
        : engine(with), kernels(conv_kernels(with.tier, T())), x(of), plan(by), threads(count), panels(ceil_div(of.channels, with.panel)),
          square(with.panel * with.panel), forms(with.one_form ? 1 : 2), groups(by, most_sums(by, with.panel * with.panel)) {
        const int64_t pairs = panels * (panels + 1) / 2, total = pairs * plan.all_sums * square * int64_t(sizeof(T));
        split = groups.count() == 1 && total <= (int64_t(3) << 20);
        cut_batch();
        cut_pairs();
    }

    int64_t band_bytes(int64_t pixels, int64_t chunk) const { return panels * engine.panel_bytes(pixels * chunk); }

    void cut_batch() {
        const int d = plan.band_axis;
        const int64_t align = engine.k_align, all = ceil_div(x.batch, align), length = plan.axes[size_t(d)].longest();
        const int64_t memory = conv_memory(x, threads), whole = band_bytes(x.pixels(), align) * forms;
        int64_t chunk = 1;  // in multiples of `align`
        const int64_t aim = engine.one_form ? l2_bytes() * 6 / 10 : int64_t(16) << 20;
        if (split) {
            chunk = most(1, aim / whole);
            if (!engine.one_form) chunk = least(chunk, 1);
            chunk = least(chunk, most(1, ceil_div(64, align)));
            chunk = least(chunk, ceil_div(all, threads));
        } else {
            chunk = least(most(1, least(128 / align, (memory / 2) / whole)), all);
        }
        int64_t chunks = ceil_div(all, chunk);
        if (split && chunks < all) chunks = least(all, ceil_div(chunks, threads) * threads);
        const int64_t row = whole / length, halo = plan.highest_shift - plan.lowest_shift;
        const int64_t limit = split ? most(2 * l2_bytes(), least(int64_t(16) << 20, memory / (2 * threads))) : memory / 2;
        int64_t bands = 1;
        if (chunk == 1 && whole > limit) bands = ceil_div(length, most(1, limit / row - halo));
        if (split && chunks * bands < 4 * threads)
            while ((chunks * bands) % threads != 0 && bands < length) ++bands;
        bands = least(bands, length);
        int64_t at = 0;
        for (int64_t c = 0; c < chunks; ++c)
            for (int64_t b = 0; b < bands; ++b) {
                const int64_t first = all * c / chunks * align, last = least(x.batch, all * (c + 1) / chunks * align);
                Band band{first, last - first, length * b / bands, length * (b + 1) / bands, 0, 0};
                band.from = most(0, band.left + plan.lowest_shift);
                band.to = bands == 1 ? length : band.left_end + plan.highest_shift;
                Images images(plan, band);
                std::vector<PixelRun> runs = pixel_runs(x, images, band);
                const int64_t depth = ceil_div(last - first, align) * align, bytes = (band_bytes(images.pixels, depth) + 63) / 64 * 64;
                items.push_back({band, depth, images, std::move(runs), bytes, at});
                at += bytes * forms;
                if (split || rounds.empty() || at > memory) {  // packed memory is used from its beginning again
                    rounds.push_back(items.size() - 1);
                    items.back().at = 0;
                    at = bytes * forms;
                }
            }
        rounds.push_back(items.size());
    }

    int64_t packed_bytes() const {
        int64_t found = 0;
        for (const Item& item : items) found = most(found, item.at + item.bytes * forms);
        return found;
    }

    // The costliest first, each to the thread that has least to do.
    void cut_pairs() {
        const auto wide = [&](int64_t p) { return double(least(engine.panel, x.channels - p * engine.panel)); };
        const double strip = engine.one_form ? double(kernels.lanes) : 16.0;
        std::vector<double> products(size_t(groups.count()) * 2, 0.0);
        for (size_t t = 0; t < plan.triples.size(); ++t) {
            const OffsetTriple& one = plan.triples[t];
            products[size_t(groups.of_triple[t]) * 2 + 1] += double(one.products);
            if (one.computed) products[size_t(groups.of_triple[t]) * 2] += double(one.products);
        }
        for (int64_t j = 0; j < panels; ++j)
            for (int64_t i = 0; i <= j; ++i)
                for (int64_t g = 0; g < groups.count(); ++g) {
                    const double tile = double(ceil_div(int64_t(wide(i)), 8) * 8) * double(ceil_div(int64_t(wide(j)), int64_t(strip))) * strip;
                    const double written = 4.0 * wide(i) * wide(j) * double(groups.sizes[size_t(g)]) / double(plan.all_sums) * double(x.offsets() * x.offsets());
                    const double flops = tile * products[size_t(g) * 2 + (i != j)] * double(x.batch) / (engine.one_form ? 28.0 : 150.0);
                    tasks.push_back({i, j, g, flops + written * (i == j ? 1 : 2), 0});
                }
        std::stable_sort(tasks.begin(), tasks.end(), [](const PanelTask& a, const PanelTask& b) { return a.cost > b.cost; });
        std::vector<double> load(size_t(threads), 0.0);
        for (PanelTask& task : tasks) {
            const auto lightest = std::min_element(load.begin(), load.end());
            *lightest += task.cost;
            task.owner = int(lightest - load.begin());
        }
    }

    // Adds one packed item's products to a task's sums. Row blocks of the image are outermost, to stay in L2.
    void correlate(const Item& item, const PanelTask& task, const char* packed, T* sums) const {
        const int64_t chunk = item.chunk, pixels = item.images.pixels, bytes = engine.panel_bytes(pixels * chunk);
        const char* const left = packed + item.at + task.i * bytes;
        const char* const right = packed + item.at + (engine.one_form ? 0 : item.bytes) + task.j * bytes;
        const int64_t ni = least(engine.panel, x.channels - task.i * engine.panel), nj = least(engine.panel, x.channels - task.j * engine.panel);
        int64_t low[3], high[3], base[3];
        for (int d = 0; d < 3; ++d) {
            low[d] = 0, high[d] = plan.axes[size_t(d)].longest(), base[d] = 0;
            if (d == plan.band_axis) low[d] = item.band.left, high[d] = item.band.left_end, base[d] = item.band.from;
        }
        const int64_t x_step = least(high[2] - low[2], most(1, 2 * run_length(engine) / chunk));
        const int64_t y_step = most(1, run_length(engine) / (x_step * chunk));
        for (int64_t z = low[0]; z < high[0]; ++z)
            for (int64_t yb = low[1]; yb < high[1]; yb += y_step)
                for (int64_t xb = low[2]; xb < high[2]; xb += x_step)
                    for (size_t t = 0; t < plan.triples.size(); ++t) {
                        const OffsetTriple& one = plan.triples[t];
                        if (groups.of_triple[t] != task.group || (task.i == task.j && !one.computed)) continue;
                        const OffsetClass& cz = plan.of(0, one.of_class[0]);
                        const OffsetClass& cy = plan.of(1, one.of_class[1]);
                        const OffsetClass& cx = plan.of(2, one.of_class[2]);
                        const int64_t ly = item.images.extent(1, cy.left_phase), lx = item.images.extent(2, cx.left_phase);
                        const int64_t ry = item.images.extent(1, cy.right_phase), rx = item.images.extent(2, cx.right_phase);
                        int64_t sum = groups.first[t];
                        for (int64_t sz = 0; sz < cz.segments(); ++sz)
                            for (int64_t sy = 0; sy < cy.segments(); ++sy)
                                for (int64_t sx = 0; sx < cx.segments(); ++sx, ++sum) {
                                    if (!cz.used[size_t(sz)] || !cy.used[size_t(sy)] || !cx.used[size_t(sx)]) continue;
                                    if (z < cz.cuts[size_t(sz)] || z >= cz.cuts[size_t(sz) + 1]) continue;
                                    const int64_t y0 = most(yb, cy.cuts[size_t(sy)]), y1 = least(least(yb + y_step, high[1]), cy.cuts[size_t(sy) + 1]);
                                    const int64_t x0 = most(xb, cx.cuts[size_t(sx)]), x1 = least(least(xb + x_step, high[2]), cx.cuts[size_t(sx) + 1]);
                                    if (y0 >= y1 || x0 >= x1) continue;
                                    const int64_t a = item.images.start(cz.left_phase, cy.left_phase, cx.left_phase) +
                                                      ((z - base[0]) * ly + y0 - base[1]) * lx + x0 - base[2];
                                    const int64_t b = item.images.start(cz.right_phase, cy.right_phase, cx.right_phase) +
                                                      ((z + cz.shift - base[0]) * ry + y0 + cy.shift - base[1]) * rx + x0 + cx.shift - base[2];
                                    const Walk over{(x1 - x0) * chunk, y1 - y0, lx * chunk, rx * chunk, pixels * chunk};
                                    engine.walk(left, right, a * chunk, b * chunk, ni, nj, over, sums + sum * square);
                                }
                    }
    }
};


}  // namespace

template <class T>
bool conv_by_panels(const Engine<T>& engine, const Convolution& x, double alpha, double beta, const Out& out, int threads) {
    const std::shared_ptr<const OffsetPlan> plan = offset_plan(x);
    const Panels<T> work(engine, x, *plan, threads);
    const PanelPacker<T> packer{engine, work.kernels, x};
    const PanelAssembly<T> assembly{work.kernels, *plan, work.groups, x, engine.panel, T(alpha), T(beta), out};
    const int64_t size = int64_t(sizeof(T)), sums = work.groups.largest() * work.square;
    const size_t packings = work.rounds.size() - 1;

    // With one packing, a task is summed and written, then the next; else as many as memory allows are summed together.
    const bool once = packings == 1 && !work.split;
    const int64_t held = work.split ? int64_t(work.tasks.size())
                         : once     ? 1
                                    : most(1, most(int64_t(16) << 20, conv_memory(x, threads)) / threads / (sums * size));
    int64_t most_tasks = 0;
    std::vector<std::vector<const PanelTask*>> mine(static_cast<size_t>(threads));
    for (const PanelTask& task : work.tasks) {
        mine[size_t(task.owner)].push_back(&task);
        most_tasks = most(most_tasks, int64_t(mine[size_t(task.owner)].size()));
    }
    const int64_t passes = work.split || once ? 1 : ceil_div(most_tasks, held);
    int64_t chunk = 0;
    for (const Item& item : work.items) chunk = most(chunk, item.chunk);

    Carver each;
    const int64_t sums_at = each.take(sums * least(held, work.split ? held : most_tasks) * size);
    const int64_t stage_at = each.take(packer.stage_elements(chunk) * size), row_at = each.take(assembly.row_elements() * size);
    const int64_t own_at = each.take(work.split ? work.packed_bytes() : 0);
    Carver all;
    const int64_t each_at = all.take(each.used * threads), seen_at = all.take(threads * 4), packed_at = all.take(work.split ? 0 : work.packed_bytes());
    char* const base = workspace(all.used);
    uint32_t* const seen = reinterpret_cast<uint32_t*>(base + seen_at);

    bool fits = true;
    parallel(threads, [&](int thread, int count) {
        PackStats stats;
        const auto area = [&](int t) { return base + each_at + t * each.used; };
        const auto sums_of = [&](int t) { return reinterpret_cast<T*>(area(t) + sums_at); };
        const auto in_range = [&]() {
            uint32_t largest = 0;
            for (int t = 0; t < count; ++t) largest = seen[t] > largest ? seen[t] : largest;
            return engine.tier != Tier::amx || bf16_holds(largest);
        };
        const auto pack = [&](const Item& item, int64_t p, char* packed, int worker) {
            char* const left = packed + item.at + p * engine.panel_bytes(item.images.pixels * item.chunk);
            packer.pack(item.band, item.images, item.runs, item.chunk, p, left, engine.one_form ? nullptr : left + item.bytes,
                        reinterpret_cast<T*>(area(worker) + stage_at), &stats);
        };
        engine.begin();
        if (work.split) {
            // With fewer threads than asked for, one does the work of several.
            for (int worker = thread; worker < threads; worker += count) {
                T* const own = sums_of(worker);
                char* const packed = area(worker) + own_at;
                std::memset(own, 0, size_t(sums * held * size));
                const size_t n = work.items.size();
                for (size_t at = n * size_t(worker) / size_t(threads); at < n * size_t(worker + 1) / size_t(threads); ++at) {
                    for (int64_t p = 0; p < work.panels; ++p) pack(work.items[at], p, packed, worker);
                    for (size_t task = 0; task < work.tasks.size(); ++task)
                        work.correlate(work.items[at], work.tasks[task], packed, own + int64_t(task) * sums);
                }
            }
            engine.end();
            seen[thread] = stats.largest;
            barrier(count);
            if (!in_range()) {
                if (thread == 0) fits = false;
                return;
            }
            for (size_t task = 0; task < work.tasks.size(); ++task) {
                if (work.tasks[task].owner % count != thread) continue;
                T* const total = sums_of(0) + int64_t(task) * sums;
                for (int other = 1; other < threads; ++other) {
                    const T* more = sums_of(other) + int64_t(task) * sums;
                    for (int64_t e = 0; e < sums; ++e) total[e] += more[e];
                }
                assembly.run(work.tasks[task], total, reinterpret_cast<T*>(area(thread) + row_at));
            }
            return;
        }
        for (int64_t pass = 0; pass < passes; ++pass) {
            for (size_t round = 0; round < packings; ++round) {
                int64_t job = 0;
                for (size_t at = work.rounds[round]; at < work.rounds[round + 1]; ++at)
                    for (int64_t p = 0; p < work.panels; ++p, ++job)
                        if (job % count == thread) pack(work.items[at], p, base + packed_at, thread);
                seen[thread] = stats.largest;
                barrier(count);
                if (once && !in_range()) break;
                for (int worker = thread; worker < threads; worker += count) {
                    const auto& list = mine[size_t(worker)];
                    const int64_t first = once ? 0 : pass * held, last = least(int64_t(list.size()), once ? int64_t(list.size()) : first + held);
                    for (int64_t k = first; k < last; ++k) {
                        T* const own = sums_of(worker) + (once ? 0 : k - first) * sums;
                        if (round == 0) std::memset(own, 0, size_t(sums * size));
                        for (size_t at = work.rounds[round]; at < work.rounds[round + 1]; ++at)
                            work.correlate(work.items[at], *list[size_t(k)], base + packed_at, own);
                        if (once) assembly.run(*list[size_t(k)], own, reinterpret_cast<T*>(area(worker) + row_at));
                    }
                }
                if (!once) barrier(count);
            }
            if (!in_range()) {
                if (thread == 0) fits = false;
                break;
            }
            for (int worker = thread; !once && worker < threads; worker += count) {
                const auto& list = mine[size_t(worker)];
                for (int64_t k = pass * held; k < least(int64_t(list.size()), (pass + 1) * held); ++k)
                    assembly.run(*list[size_t(k)], sums_of(worker) + (k - pass * held) * sums, reinterpret_cast<T*>(area(worker) + row_at));
            }
        }
        engine.end();
    });
    return fits;
}

template bool conv_by_panels<float>(const Engine<float>&, const Convolution&, double, double, const Out&, int);
template bool conv_by_panels<double>(const Engine<double>&, const Convolution&, double, double, const Out&, int);

}  // namespace hvpfast

// The parts of the panel form: how the work is cut, packing, and writing the result.
#pragma once

#include <vector>

#include "conv.hpp"

namespace hvpfast {

// Pixels of one band in packed order, as runs of one image row (or more, where rows are neighbours).
struct PixelRun {
    int64_t offset, count;
};
std::vector<PixelRun> pixel_runs(const Convolution& x, const Images& images, const Band& band);

// A pair of channel panels (i <= j) and a group of offset classes whose sums fit in scratch memory: the unit of work.
struct PanelTask {
    int64_t i, j, group;
    double cost;
    int owner;
};

// Offset triples in groups, and where each one's sums (squares of one panel) begin within its group.
struct SumGroups {
    std::vector<int64_t> of_triple, first, sizes;
    SumGroups(const OffsetPlan& plan, int64_t most_sums);
    int64_t count() const { return int64_t(sizes.size()); }
    int64_t largest() const;
};

template <class T>
struct PanelPacker {
    const Engine<T>& engine;
    const ConvKernels<T>& kernels;
    const Convolution& x;
    static constexpr int64_t kStage = 2048;  // rows turned at a time for AMX, which packs them again
    bool plain() const { return x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32); }
    int64_t stage_pixels(int64_t chunk) const { return engine.one_form ? 256 : most(1, kStage / chunk); }
    int64_t stage_elements(int64_t chunk) const {
        return engine.panel * stage_pixels(chunk) + (engine.one_form ? 0 : stage_pixels(chunk) * chunk * engine.panel);
    }
    // Panel p of a band, each pixel `chunk` rows deep. `stage`: scratch memory of stage_elements.
    void pack(const Band& band, const Images& images, const std::vector<PixelRun>& runs, int64_t chunk, int64_t p, char* left, char* right,
              T* stage, PackStats* stats) const;
};

template <class T>
struct PanelAssembly {
    const ConvKernels<T>& kernels;
    const OffsetPlan& plan;
    const SumGroups& groups;
    const Convolution& x;
    int64_t panel;
    T alpha, beta;
    const Out& out;
    int64_t row_elements() const { return panel * x.offsets() + panel * panel; }
    // Writes the blocks of one task and their mirror images. `sums` is changed. `row`: scratch memory of row_elements.
    void run(const PanelTask& task, T* sums, T* row) const;

private:
    void rows(const PanelTask& task, bool turned, const T* sums, T* row) const;
};

}  // namespace hvpfast

// conv_gram: the Gram matrix of a convolution's patches, which are never formed; the choice among its forms (conv.hpp).
#include "conv.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

int64_t item_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Rough cycles of each form, to choose among them.
struct Costs {
    double panels = 0, lanes = 0, patches = 0;
};

template <class T>
Costs costs(const Engine<T>& engine, const ConvKernels<T>& kernels, const Convolution& x) {
    const std::shared_ptr<const OffsetPlan> plan = offset_plan(x);
    Costs cost;
    const double width = double(kernels.lanes), channels = double(x.channels), batch = double(x.batch);
    const double values = batch * channels * double(x.pixels()), offsets = double(x.offsets());
    const bool amx = engine.tier == Tier::amx;
    const double rate = amx ? 150.0 : 1.8 * width;  // products a cycle

    const double fold = double(least(most(1, kernels.lanes / x.groups), x.batch)), groups = double(x.groups);
    const double vectors = double(ceil_div(int64_t(groups * fold), kernels.lanes)) * double(ceil_div(x.batch, int64_t(fold)));
    cost.lanes = vectors * (double(plan->computed_products) * channels * (channels < 2 ? 0.7 * channels : 0.6 * channels) + 6.0 * channels * double(x.pixels())) +
                 double(ceil_div(int64_t(groups * fold), kernels.lanes)) * double(plan->computed_sums) * channels * channels * 8.0;

    const double panels = double(ceil_div(x.channels, engine.panel));
    const double strips = amx ? double(ceil_div(x.channels, 16)) * 16 : double(ceil_div(x.channels, kernels.lanes)) * width;
    const double row = amx ? strips : double(ceil_div(x.channels, 8)) * 8;
    const double depth = amx ? double(ceil_div(x.batch, 32) * 32) : batch;
    const double slow = !amx && channels < 2.5 * width ? (channels <= width ? 1.7 : 1.25) : 1.0;  // narrow register tiles
    cost.panels = slow * groups * (row * strips * double(plan->computed_products) * depth / rate +
                            panels * panels * double(engine.panel * engine.panel * plan->computed_sums) * (amx ? 0.6 : 0.4)) +
                  groups * values * (amx ? 2.0 : 0.6) + groups * (channels * offsets) * (channels * offsets) * 1.0;

    const double positions = double(x.positions[0] * x.positions[1] * x.positions[2]) * batch, features = channels * offsets;
    const double wide = double(ceil_div(int64_t(features), amx ? 16 : kernels.lanes)) * (amx ? 16.0 : width);
    cost.patches = groups * (positions * (wide * (wide + double(engine.panel)) / 2 / rate + wide * (amx ? 1.0 : 0.45)) + wide * wide * 1.0);
    return cost;
}

Convolution group_of(const Convolution& x, int64_t group) {
    Convolution one = x;
    one.groups = 1;
    one.data = static_cast<const char*>(x.data) + group * x.channels * x.channel_stride * item_size(x.dtype);
    return one;
}

struct Choice {
    ConvForm form;
    double cost;
};

// `whole`: panels are allowed (AMX pads samples and channels to its tiles).
Choice choose(const Costs& cost, const Convolution& x, bool whole) {
    if (x.offsets() == 1 && x.channels > 4) return {ConvForm::patches, cost.patches};  // nothing to share
    Choice best{ConvForm::patches, cost.patches};
    if (whole && cost.panels <= best.cost) best = {ConvForm::panels, cost.panels};
    if (cost.lanes <= best.cost) best = {ConvForm::lanes, cost.lanes};
    return best;
}

template <class T>
bool one_group(ConvForm form, const Engine<T>& engine, const Convolution& x, double alpha, double beta, const Out& out, int threads) {
    if (form == ConvForm::patches) return conv_by_patches(engine, x, alpha, beta, out, threads);
    return conv_by_panels(engine, x, alpha, beta, out, threads);
}

template <class T>
bool with_engine(const Engine<T>& engine, ConvForm form, const Convolution& x, double alpha, double beta, const GroupsOut& out, int threads) {
    if (form == ConvForm::automatic) form = choose(costs(engine, conv_kernels(engine.tier, T()), x), x, true).form;
    if (form == ConvForm::lanes) {
        conv_by_lanes<T>(x, alpha, beta, out, threads);
        return true;
    }
    const int64_t width = x.channels * x.offsets();
    const auto of_group = [&](int64_t group) {
        return Out{static_cast<T*>(out.data) + group * out.group_stride, width, width, out.row_stride, out.col_stride};
    };
    if (x.groups == 1) return one_group(form, engine, group_of(x, 0), alpha, beta, of_group(0), threads);
    // A group that does not fit a reduced precision is computed again alone, by the vector engine.
    const auto run = [&](int64_t group, int with) {
        const Convolution one = group_of(x, group);
        if (one_group(form, engine, one, alpha, beta, of_group(group), with)) return;
        if constexpr (sizeof(T) == 4) one_group(form, engine_f32(engine.tier), one, alpha, beta, of_group(group), with);
    };
    if (x.groups < threads) {
        for (int64_t group = 0; group < x.groups; ++group) run(group, threads);
        return true;
    }
    parallel(threads, [&](int index, int count) {
        for (int64_t group = x.groups * index / count; group < x.groups * (index + 1) / count; ++group) run(group, 1);
    });
    return true;
}

}  // namespace

int64_t conv_memory(const Convolution& x, int threads) {
    const int64_t scratch = int64_t(5) << 20;  // sums and staging areas of a thread
    const int64_t twice = least(2 * x.batch * x.channels * x.pixels() * item_size(x.dtype), kWorkspaceBound);
    return most(twice - threads * scratch, threads * scratch);
}

void conv_gram(const Convolution& x, double alpha, double beta, const GroupsOut& out, Precision precision, int threads, ConvForm form) {
    if (!threads_allowed || threads < 1) threads = 1;
    const Tier tier = tier_in_use();
    if (form == ConvForm::automatic && x.offsets() == 1) {  // few channels: reading x is most of it
        if (conv_has_pixels<float>(x, conv_kernels_f32(tier).lanes)) return conv_by_pixels<float>(x, alpha, beta, out, threads);
        if (conv_has_pixels<double>(x, conv_kernels_f64(tier).lanes)) return conv_by_pixels<double>(x, alpha, beta, out, threads);
    }
    if (x.dtype == Dtype::f64) {
        with_engine(engine_f64(tier), form, x, alpha, beta, out, threads);
        return;
    }
    const Engine<float>& vector = engine_f32(tier);
    if (tier == Tier::amx && x.dtype != Dtype::f16 && form != ConvForm::lanes) {
        const bool narrow = x.channels * x.offsets() < (precision == Precision::automatic ? 48 : 32);
        if (precision == Precision::automatic) precision = Precision::bf16x3;
        const Engine<float>* amx = engine_amx(precision, x.dtype);
        const int64_t rows = x.batch * x.positions[0] * x.positions[1] * x.positions[2];
        if (amx != nullptr && !narrow && rows >= 32) {
            const bool whole = x.batch >= 16 && x.channels >= 16;
            ConvForm taken = form;
            if (form == ConvForm::automatic) {
                const Choice tiles = choose(costs(*amx, conv_kernels_f32(tier), x), x, whole);
                const Choice lanes = choose(costs(vector, conv_kernels_f32(tier), x), x, true);
                taken = tiles.cost < lanes.cost ? tiles.form : ConvForm::lanes;
            }
            const bool fits = taken == ConvForm::patches || (taken == ConvForm::panels && whole);
            if (fits && with_engine(*amx, taken, x, alpha, beta, out, threads)) return;
        }
    }
    with_engine(vector, form, x, alpha, beta, out, threads);
}

}  // namespace hvpfast

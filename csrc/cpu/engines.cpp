// The vector engine and the row kernels of each tier. AMX has no full float32 products: its tier uses AVX-512's.
#include "engine.hpp"
#include "rowwise.hpp"

namespace hvpfast {

Engine<float> engine_portable_f32();
Engine<double> engine_portable_f64();
Rowwise<float> rowwise_portable_f32();
Rowwise<double> rowwise_portable_f64();
#if HVPFAST_X86
Engine<float> engine_avx2_f32();
Engine<double> engine_avx2_f64();
Engine<float> engine_avx512_f32();
Engine<double> engine_avx512_f64();
Rowwise<float> rowwise_avx2_f32();
Rowwise<double> rowwise_avx2_f64();
Rowwise<float> rowwise_avx512_f32();
Rowwise<double> rowwise_avx512_f64();
#endif

const Engine<float>& engine_f32(Tier tier) {
#if HVPFAST_X86
    static const Engine<float> engines[] = {engine_portable_f32(), engine_avx2_f32(), engine_avx512_f32()};
    return engines[tier == Tier::amx ? 2 : int(tier)];
#else
    static const Engine<float> engine = engine_portable_f32();
    return (void)tier, engine;
#endif
}

const Engine<double>& engine_f64(Tier tier) {
#if HVPFAST_X86
    static const Engine<double> engines[] = {engine_portable_f64(), engine_avx2_f64(), engine_avx512_f64()};
    return engines[tier == Tier::amx ? 2 : int(tier)];
#else
    static const Engine<double> engine = engine_portable_f64();
    return (void)tier, engine;
#endif
}

const Rowwise<float>& rowwise_f32(Tier tier) {
#if HVPFAST_X86
    static const Rowwise<float> kernels[] = {rowwise_portable_f32(), rowwise_avx2_f32(), rowwise_avx512_f32()};
    return kernels[tier == Tier::amx ? 2 : int(tier)];
#else
    static const Rowwise<float> kernels = rowwise_portable_f32();
    return (void)tier, kernels;
#endif
}

const Rowwise<double>& rowwise_f64(Tier tier) {
#if HVPFAST_X86
    static const Rowwise<double> kernels[] = {rowwise_portable_f64(), rowwise_avx2_f64(), rowwise_avx512_f64()};
    return kernels[tier == Tier::amx ? 2 : int(tier)];
#else
    static const Rowwise<double> kernels = rowwise_portable_f64();
    return (void)tier, kernels;
#endif
}

}  // namespace hvpfast

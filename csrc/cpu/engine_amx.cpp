// The engine on AMX: bf16 tiles, float32 sums, 32 x 32 blocks of 2 x 2 tiles.
//
// Packed form: groups of 32 rows, [group][strip of 16 features][hi, lo][16][16] 32-bit lanes, each lane a pair of
// neighbouring rows. A right operand's tile is [row pair][feature]; a left operand's is its transpose, [feature][row
// pair]: one load and one split of x serve both. float32 data are split into hi + lo, two bf16 each, and multiplied as
// hi hi' + hi lo' + lo hi'; what is left out, lo lo', matters on a Gram matrix's diagonal only, where packing sums it.
#include "engine.hpp"
#include "scalar.hpp"

#if HVPFAST_AMX
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics: bug 105593
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,amx-tile,amx-bf16")
#endif

namespace hvpfast {
namespace {
#include "transpose512.hpp"

constexpr int64_t kPanel = 32, kGroup = 32, kTile = 1024;  // features, rows, bytes

void begin() {
    alignas(64) struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("" ::"m"(config) : "memory");
    _tile_loadconfig(&config);
}

void end() { _tile_release(); }

template <int PARTS>
int64_t panel_bytes(int64_t k) { return ceil_div(k, kGroup) * 2 * PARTS * kTile; }

#include "amx_packing.hpp"

// 2 x 2 tiles over all groups: sums in tmm0-3, left strips in tmm4-5, right ones in tmm6-7. Loads stand between
// products; each operand tile is loaded once a group. `a1`, `b1`: bytes from the first strip to the second, 0 where
// there is none (its sums are then not used: one tile alone would wait for its own product's latency).
template <int PARTS>
HVPFAST_INLINE void sum_2x2(const char* a, const char* b, int64_t a1, int64_t b1, int64_t groups, const Ahead* ahead) {
    constexpr int64_t kStep = 2 * PARTS * kTile;
    const char *sums = nullptr, *past = nullptr, *lines = nullptr;
    int64_t each = 0;
    if (ahead != nullptr) {
        sums = static_cast<const char*>(ahead->sums);
        past = sums == nullptr ? nullptr : sums + kPanel * kPanel * 4;
        lines = ahead->lines;
        each = ceil_div(ahead->count, groups);
    }
    for (int64_t g = 0; g < groups; ++g, a += kStep, b += kStep) {
        if (sums != past) {
#pragma GCC unroll 8
            for (int line = 0; line < 8; ++line, sums += 64) _mm_prefetch(sums, _MM_HINT_T0);
        }
        for (int64_t line = 0; line < each; ++line, lines += 64) _mm_prefetch(lines, _MM_HINT_T1);
        if (PARTS == 1) {
            _tile_loadd(6, b, 64);
            _tile_loadd(4, a, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b + b1, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + a1, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_loadd(6, b, 64);
            _tile_loadd(4, a + kTile, 64);
            _tile_dpbf16ps(0, 4, 6);  // lo hi'
            _tile_loadd(7, b + b1, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + a1 + kTile, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(4, a, 64);
            _tile_dpbf16ps(3, 5, 7);
            _tile_loadd(5, a + a1, 64);
            _tile_dpbf16ps(0, 4, 6);  // hi hi'
            _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(6, b + kTile, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
            _tile_loadd(7, b + b1 + kTile, 64);
            _tile_dpbf16ps(0, 4, 6);  // hi lo'
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

HVPFAST_INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

HVPFAST_INLINE void store_sums(float* to) {
    constexpr int64_t kRow = kPanel * 4;
    _tile_stored(0, to, kRow);
    _tile_stored(1, to + 16, kRow);
    _tile_stored(2, to + 16 * kPanel, kRow);
    _tile_stored(3, to + 16 * kPanel + 16, kRow);
    __asm__ volatile("" ::: "memory");
}

HVPFAST_INLINE void add_block(float* c, const float* held) {
#pragma GCC unroll 8
    for (int64_t e = 0; e < kPanel * kPanel; e += 16)
        _mm512_storeu_ps(c + e, _mm512_add_ps(_mm512_loadu_ps(c + e), _mm512_load_ps(held + e)));
}

// Sum over the valid ni x nj part only: a zero feature times an inf is NaN.
double total(const float* held, const float* with, int64_t ni, int64_t nj) {
    __m512d total = _mm512_setzero_pd();
    for (int s = 0; 16 * s < nj; ++s) {
        const __mmask16 valid = __mmask16(nj - 16 * s >= 16 ? 0xffff : (1u << (nj - 16 * s)) - 1);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t r = 0; r < ni; ++r)
            sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(valid, held + r * kPanel + 16 * s),
                                  _mm512_maskz_loadu_ps(valid, with + r * kPanel + 16 * s), sum);
        total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_castps512_ps256(sum)));
        total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1)));
    }
    return _mm512_reduce_add_pd(total);
}

template <int PARTS>
double block(Mode mode, const void* left, const void* right, int64_t ni, int64_t nj, int64_t k, bool, float* c,
             const Ahead* ahead) {
    alignas(64) float held[kPanel * kPanel];
    __asm__ volatile("" ::: "memory");  // the tile intrinsics do not say that they read memory
    zero_sums();
    sum_2x2<PARTS>(static_cast<const char*>(left), static_cast<const char*>(right), ni > 16 ? PARTS * kTile : 0,
                   nj > 16 ? PARTS * kTile : 0, ceil_div(k, kGroup), ahead);
    store_sums(mode == Mode::store ? c : held);
    if (mode == Mode::add) {
        add_block(c, held);
    } else if (mode == Mode::add_square) {
#pragma GCC unroll 8
        for (int64_t e = 0; e < kPanel * kPanel; e += 16) {
            const __m512 value = _mm512_load_ps(held + e);
            _mm512_storeu_ps(c + e, _mm512_fmadd_ps(value, value, _mm512_loadu_ps(c + e)));
        }
    } else if (mode != Mode::store) {
        return total(held, mode == Mode::dot ? c : held, ni, nj);
    }
    return 0;
}

template <int PARTS>
void walk(const void* left, const void* right, int64_t left_row, int64_t right_row, int64_t ni, int64_t nj, const Walk& over, float* c) {
    constexpr int64_t kGroupBytes = 2 * PARTS * kTile;
    const char* a = static_cast<const char*>(left) + left_row / kGroup * kGroupBytes;
    const char* b = static_cast<const char*>(right) + right_row / kGroup * kGroupBytes;
    alignas(64) float held[kPanel * kPanel];
    __asm__ volatile("" ::: "memory");
    zero_sums();
    for (int64_t run = 0; run < over.runs; ++run) {
        sum_2x2<PARTS>(a, b, ni > 16 ? PARTS * kTile : 0, nj > 16 ? PARTS * kTile : 0, over.k / kGroup, nullptr);
        a += over.left_step / kGroup * kGroupBytes;
        b += over.right_step / kGroup * kGroupBytes;
    }
    store_sums(held);
    add_block(c, held);
}

template <int PARTS>
constexpr Engine<float> engine() {
    return {kPanel, kGroup, false, Tier::amx, panel_bytes<PARTS>, pack<PARTS>, pack_squares<PARTS>, block<PARTS>, nullptr, nullptr, 0, 0, walk<PARTS>, nullptr, nullptr, begin, end};
}

constexpr Engine<float> kOnce = engine<1>(), kThrice = engine<2>();

}  // namespace

const Engine<float>* engine_amx(Precision precision, Dtype dtype) {
    if (dtype == Dtype::bf16) return &kOnce;  // bf16 products are exact
    if (dtype == Dtype::f32 && precision == Precision::bf16x3) return &kThrice;
    if (dtype == Dtype::f32 && precision == Precision::bf16) return &kOnce;
    return nullptr;
}

}  // namespace hvpfast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else

namespace hvpfast {
const Engine<float>* engine_amx(Precision, Dtype) { return nullptr; }
}  // namespace hvpfast

#endif

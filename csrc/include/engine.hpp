// The tile engine: every kernel is packed panels, products of two panels, and an epilogue.
//
// A panel is `panel` neighbouring features of a matrix (its columns), k of its rows deep, packed so that the inner
// loop reads it in order. `block` multiplies two panels over k, (panel x panel) = a' b, and disposes of the result as
// `Mode` says. Sums start at zero in every call, so that a long sum is a sum of partial sums (7e-7 -> 1e-7 relative
// error at N = 8192; 2-core AVX-512, 2026-11-21).
#pragma once

#include "common.hpp"

namespace hvpfast {

enum class Mode : int {
    store,       // c = a'b
    add,         // c += a'b
    add_square,  // c += (a'b) o (a'b)
    sum_square,  // returns sum (a'b) o (a'b); c unused
    dot          // returns sum (a'b) o c
};

// What packing learns of the data; a reduced-precision kernel needs it to know whether its result stands.
struct PackStats {
    uint32_t largest = 0;          // bits of the largest |x|, as float32
    float* low_squares = nullptr;  // per feature of the panel: sum of the squared low halves is added here (may be null)
};

constexpr uint32_t float_bits_of_power(int power) { return uint32_t(127 + power) << 23; }

// bf16 products keep float32's range but lose its subnormals, and an inf splits into inf - inf: outside this range of
// the largest |x| a result is computed again in float32.
constexpr bool bf16_holds(uint32_t largest) {
    return largest == 0 || (largest > float_bits_of_power(-45) && largest < float_bits_of_power(50));
}

// The same for a product of two matrices: neither a split's low half nor the products may fall below float32's range.
constexpr bool bf16_holds(uint32_t left, uint32_t right) {
    return left < float_bits_of_power(50) && right < float_bits_of_power(50) &&
           (left == 0 || right == 0 ||
            (left > float_bits_of_power(-90) && right > float_bits_of_power(-90) &&
             left + right > float_bits_of_power(-85) + float_bits_of_power(0)));
}

// A sum over several runs of packed rows: `runs` times k rows, the runs `left_step` / `right_step` packed rows apart,
// in panels that were packed `packed` rows deep. Steps and k are multiples of the engine's k_align.
struct Walk {
    int64_t k, runs, left_step, right_step, packed;
};

// What a block fetches for later ones while it multiplies: a panel of the last-level cache would else be waited for.
struct Ahead {
    const void* sums;   // the c of the next call, or null
    const char* lines;  // `count` cache lines of panels that are needed soon; may be null if count is 0
    int64_t count;
};

// Rows of a matrix whose features lie side by side.
template <class T>
struct Flat {
    const T* data;
    int64_t pitch, features;
    Flat at(int64_t row, int64_t feature, int64_t count) const { return {data + row * pitch + feature, pitch, count}; }
};

constexpr int64_t kMostFew = 16;

template <class T>
struct Engine {
    int64_t panel;    // features a panel, and the row length of c
    int64_t k_align;  // k is padded (with zeros) to a multiple of this when packed
    bool one_form;    // a panel packs to the same bytes as left and as right operand
    Tier tier;
    int64_t (*panel_bytes)(int64_t k);  // of one form
    // Packs rows [row, row + k) of features [p * panel, (p + 1) * panel) as left (`a`) and right (`b`) operand; either
    // may be null, and with one_form only `a` is written. With `ones`, feature x.cols is 1 in every row.
    void (*pack)(const Rows& x, int64_t row, int64_t k, int64_t p, bool ones, void* a, void* b, PackStats* stats);
    // The squares of float32 features that lie side by side, likewise; null but on AMX.
    void (*pack_squares)(const Rows& x, int64_t row, int64_t k, int64_t p, void* a, void* b, PackStats* stats);
    // c (rows of length `panel`) over the first ni x nj features. `upper`: only elements on and above the diagonal are
    // needed. `ahead` may be null.
    double (*block)(Mode mode, const void* a, const void* b, int64_t ni, int64_t nj, int64_t k, bool upper, T* c,
                    const Ahead* ahead);
    // c (= or +=) a'b over `k` rows, for at most one panel of features each, unpacked. `upper`: on and above the diagonal
    // only. Reads up to a panel past the last row's end. `next`: whether the rows after these are fetched. Null on AMX.
    void (*direct)(Mode mode, const Flat<T>& a, const Flat<T>& b, int64_t k, bool upper, bool next, T* c);
    // Rows [first, last) of out = beta out + alpha x'x, whole, over `k` unpacked rows of at least `few_least` features or with
    // as much memory behind each; null on AMX. `out` (rows `pitch` apart) is not read if beta is 0, and is not x. `upper`: those
    // rows from the diagonal on, and as columns too; for `few_square` rows, of which `first` is a multiple, and beta 0.
    void (*few)(const Flat<T>& x, int64_t k, int64_t first, int64_t last, bool upper, double alpha, double beta, T* out, int64_t pitch);
    int64_t few_least, few_square;  // few_least: at most kMostFew. few_square: 0 if `upper` does not pay
    // c += a'b over a walk that starts at packed rows `left_row` and `right_row`.
    void (*walk)(const void* a, const void* b, int64_t left_row, int64_t right_row, int64_t ni, int64_t nj, const Walk& over, T* c);
    // `lanes` (at most panel) arrays of `count` values, `apart` from each other, become rows: to[r * pitch + lane].
    // Lanes up to the next multiple of a strip are written as zero.
    void (*turn)(const T* from, int64_t apart, int64_t lanes, int64_t count, T* to, int64_t pitch);
    double (*row_squares)(const Rows& x, int64_t row);  // sum of squares of one row
    void (*begin)();  // once a thread, before its first block, and
    void (*end)();    // after its last
};

const Engine<float>& engine_f32(Tier tier);                 // full float32 products
const Engine<double>& engine_f64(Tier tier);
const Engine<float>* engine_amx(Precision precision, Dtype dtype);  // bf16 (one product) or bf16x3; null: not built

}  // namespace hvpfast

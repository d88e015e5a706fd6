// Types that every kernel shares. No torch header: pointers, extents and strides come in, in elements.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HVPFAST_X86 1
#else
#define HVPFAST_X86 0
#endif

#if HVPFAST_X86 && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define HVPFAST_AMX 1
#else
#define HVPFAST_AMX 0
#endif

#if defined(_MSC_VER)
#define HVPFAST_INLINE static __forceinline
#define HVPFAST_INLINE_MEMBER __forceinline
#else
#define HVPFAST_INLINE static inline __attribute__((always_inline))
#define HVPFAST_INLINE_MEMBER inline __attribute__((always_inline))
#endif

namespace hvpfast {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Precision : int { automatic = 0, ieee = 1, bf16x3 = 2, bf16 = 3 };
enum class Tier : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// A matrix of `outer * inner` rows and `cols` columns inside a strided tensor: element (p, q, c) lies at
// data + p * outer_stride + q * inner_stride + c * col_stride (in elements of `dtype`); row = p * inner + q.
struct Rows {
    const void* data;
    Dtype dtype;
    int64_t outer, inner, cols;
    int64_t outer_stride, inner_stride, col_stride;
    int64_t rows() const { return outer * inner; }
};

// A writable strided matrix of float or double.
struct Out {
    void* data;
    int64_t rows, cols, row_stride, col_stride;
    bool lower = false;  // of a symmetric result: what is above the diagonal is neither read nor written
};

HVPFAST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
HVPFAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HVPFAST_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace hvpfast

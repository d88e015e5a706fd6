// softmax_hvp: weight (diag(p) - p p') v row by row, p = softmax(logits): one pass over a row and its vectors.
//
// A row's exponentials are formed once, in scratch that stays in L2 (512 KB for 128k classes), and serve all K vectors.
// Only the result is written to memory; torch's formulation writes four arrays of its size.
#include "batch.hpp"
#include "rowwise.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace hvpfast {
namespace {

template <class T>
void products(const Rowwise<T>& rowwise, const SoftmaxRows& x, T* out, int threads) {
    const bool own = x.dtype == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32);
    const int64_t scratch = ceil_div(x.classes, rowwise.width) * rowwise.width;
    // With fewer rows than threads there is too little to share out.
    if (x.rows * x.classes * (x.columns + 2) < (int64_t(1) << 14)) threads = 1;
    Carver carver;
    const int64_t each = (carver.take(scratch * int64_t(sizeof(T))), carver.used);
    char* const base = workspace(each * threads);
    parallel(threads, [&](int index, int count) {
        T* const e = reinterpret_cast<T*>(base + index * each);
        for (int64_t row = x.rows * index / count; row < x.rows * (index + 1) / count; ++row) {
            rowwise.widen(at_element(x.logits, x.dtype, row * x.classes), x.dtype, 1, x.classes, e);
            const double sum = rowwise.exponentials(e, x.classes);
            T weight = T(1);
            if (x.weight != nullptr) rowwise.widen(at_element(x.weight, x.dtype, row * x.weight_stride), x.dtype, 1, 1, &weight);
            for (int64_t column = 0; column < x.columns; ++column) {
                const int64_t at = (column * x.rows + row) * x.classes;
                const void* const v = at_element(x.v, x.dtype, at);
                if (own) {
                    rowwise.project(e, sum, static_cast<const T*>(v), x.classes, weight, out + at);
                } else {
                    rowwise.widen(v, x.dtype, 1, x.classes, out + at);
                    rowwise.project(e, sum, out + at, x.classes, weight, out + at);
                }
            }
        }
    });
}

}  // namespace

void softmax_hvp(const SoftmaxRows& x, void* out, int threads) {
    if (!threads_allowed || threads < 1) threads = 1;
    if (x.rows == 0 || x.columns == 0 || x.classes == 0) return;
    if (x.dtype == Dtype::f64) products(rowwise_f64(tier_in_use()), x, static_cast<double*>(out), threads);
    else products(rowwise_f32(tier_in_use()), x, static_cast<float*>(out), threads);
}

}  // namespace hvpfast

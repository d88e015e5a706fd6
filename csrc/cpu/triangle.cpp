// The epilogue of symmetric products: sums the threads' copies, scales, and writes both triangles.
#include "triangle.hpp"

#include <cmath>

namespace hvpfast {
namespace {

constexpr int64_t kWidest = 48;

// rows x cols of `from` (rows of `pitch`) into out at (r0, c0).
template <class T>
void write(const T* from, int64_t pitch, int64_t rows, int64_t cols, T alpha, T beta, const Out& out, int64_t r0, int64_t c0) {
    T* base = static_cast<T*>(out.data) + r0 * out.row_stride + c0 * out.col_stride;
    for (int64_t r = 0; r < rows; ++r, from += pitch, base += out.row_stride) {
        if (out.col_stride == 1) {
            if (beta == 0) {
                for (int64_t c = 0; c < cols; ++c) base[c] = alpha * from[c];
            } else {
                for (int64_t c = 0; c < cols; ++c) base[c] = beta * base[c] + alpha * from[c];
            }
        } else {
            for (int64_t c = 0; c < cols; ++c) {
                T& to = base[c * out.col_stride];
                to = beta == 0 ? alpha * from[c] : beta * to + alpha * from[c];
            }
        }
    }
}

}  // namespace

template <class T>
void mirror_squares(const Triangle& shape, int64_t first, int64_t last, const T* squares, int64_t copies, int64_t apart,
                    const float* diagonal, int64_t groups, double alpha, double beta, const Out& out) {
    alignas(64) T sum[kWidest * kWidest], turned[kWidest * kWidest];
    const int64_t panel = shape.panel, size = panel * panel;
    int64_t j = int64_t((std::sqrt(8.0 * double(first) + 1.0) - 1.0) / 2.0);
    while (j * (j + 1) / 2 > first) --j;
    while ((j + 1) * (j + 2) / 2 <= first) ++j;
    int64_t i = first - j * (j + 1) / 2;
    for (int64_t square = first; square < last; ++square) {
        const T* from = squares + square * size;
        const int64_t ni = least(panel, out.rows - i * panel), nj = least(panel, out.cols - j * panel);
        for (int64_t e = 0; e < ni * panel; ++e) sum[e] = from[e];
        for (int64_t copy = 1; copy < copies; ++copy)
            for (int64_t e = 0; e < ni * panel; ++e) sum[e] += from[copy * apart + e];
        if (i == j) {
            for (int64_t r = 0; r < ni; ++r) {
                if (diagonal != nullptr)
                    for (int64_t group = 0; group < groups; ++group)
                        sum[r * panel + r] += diagonal[group * shape.panels * panel + i * panel + r];
                for (int64_t c = r + 1; c < nj; ++c) sum[c * panel + r] = sum[r * panel + c];
            }
        } else {
            for (int64_t r = 0; r < ni; ++r)
                for (int64_t c = 0; c < nj; ++c) turned[c * panel + r] = sum[r * panel + c];
            write<T>(turned, panel, nj, ni, T(alpha), T(beta), out, j * panel, i * panel);
        }
        write<T>(sum, panel, ni, nj, T(alpha), T(beta), out, i * panel, j * panel);
        if (++i > j) i = 0, ++j;
    }
}

template void mirror_squares<float>(const Triangle&, int64_t, int64_t, const float*, int64_t, int64_t, const float*, int64_t, double,
                                    double, const Out&);
template void mirror_squares<double>(const Triangle&, int64_t, int64_t, const double*, int64_t, int64_t, const float*, int64_t,
                                     double, double, const Out&);

}  // namespace hvpfast

// The epilogue of symmetric products: sums the threads' copies, scales, and writes both triangles, or the lower one.
#include "triangle.hpp"

#include "engine.hpp"
#include "rowwise.hpp"
#include "tiers.hpp"

namespace hvpfast {
namespace {

// rows x cols of `from` (rows of `pitch`) into out at (r0, c0). `lower`: of each row, up to the block's diagonal.
template <class T>
void write(const Rowwise<T>& rowwise, const T* from, int64_t pitch, int64_t rows, int64_t cols, T beta, const Out& out, int64_t r0,
           int64_t c0, bool stream, bool lower) {
    T* base = static_cast<T*>(out.data) + r0 * out.row_stride + c0 * out.col_stride;
    if (out.col_stride == 1 && beta == 0 && !lower) return rowwise.copy(from, pitch, rows, cols, base, out.row_stride, stream);
    for (int64_t r = 0; r < rows; ++r, from += pitch, base += out.row_stride) {
        const int64_t count = lower ? r + 1 : cols;
        if (out.col_stride == 1 && beta == 0) {
            rowwise.copy(from, pitch, 1, count, base, out.row_stride, stream);
        } else if (out.col_stride == 1) {
            for (int64_t c = 0; c < count; ++c) base[c] = beta * base[c] + from[c];
        } else {
            for (int64_t c = 0; c < count; ++c) {
                T& to = base[c * out.col_stride];
                to = beta == 0 ? from[c] : beta * to + from[c];
            }
        }
    }
}

const Rowwise<float>& row_kernels(float) { return rowwise_f32(tier_in_use()); }
const Rowwise<double>& row_kernels(double) { return rowwise_f64(tier_in_use()); }
const Engine<float>& vector_engine(float) { return engine_f32(tier_in_use()); }
const Engine<double>& vector_engine(double) { return engine_f64(tier_in_use()); }

}  // namespace

template <class T>
void mirror_squares(const Triangle& shape, int index, int count, const T* squares,
                    int64_t copies, int64_t apart, const float* diagonal, int64_t groups, double alpha, double beta, const Out& out,
                    T* scratch) {
    const Rowwise<T>& rowwise = row_kernels(T());
    const auto turn = vector_engine(T()).turn;
    const int64_t panel = shape.panel, side = shape.patch(int64_t(sizeof(T))), pitch = side * panel;
    const bool stream = side > 1;
    const bool plain = side == 1 && copies == 1 && alpha == 1 && beta == 0 && out.col_stride == 1;
    const int64_t width = rowwise.width;  // lanes that `turn` takes at a time
    T *const straight = scratch, *const turned = scratch + pitch * pitch;
    int64_t before = 0;
    for (int64_t j0 = 0; j0 < shape.panels; j0 += side)
        for (int64_t i0 = 0; i0 <= j0; i0 += side) {
            const int64_t i_last = least(shape.panels, i0 + side), j_last = least(shape.panels, j0 + side);
            const int64_t first = before;
            before += i0 == j0 ? (j_last - j0) * (j_last - j0 + 1) / 2 : (i_last - i0) * (j_last - j0);
            if (first * count / shape.squares() != index) continue;
            for (int64_t j = j0; j < j_last; ++j)
                for (int64_t i = i0; i < i_last && i <= j; ++i) {
                    const T* const from = squares + shape.at(i, j);
                    const int64_t ni = least(panel, out.rows - i * panel), nj = least(panel, out.cols - j * panel);
                    if (plain && i != j) {  // straight to their places
                        T* const base = static_cast<T*>(out.data);
                        if (!out.lower) rowwise.copy(from, panel, ni, nj, base + i * panel * out.row_stride + j * panel, out.row_stride, false);
                        turn(from, panel, ni, nj, base + j * panel * out.row_stride + i * panel, out.row_stride);
                        continue;
                    }
                    T* const to = straight + (i - i0) * panel * pitch + (j - j0) * panel;
                    for (int64_t r = 0; r < ni; ++r) {
                        T* const row = to + r * pitch;
                        for (int64_t c = 0; c < panel; ++c) row[c] = from[r * panel + c];
                        for (int64_t copy = 1; copy < copies; ++copy)
                            for (int64_t c = 0; c < panel; ++c) row[c] += from[copy * apart + r * panel + c];
                        if (i == j && diagonal != nullptr)
                            for (int64_t group = 0; group < groups; ++group)
                                row[r] += T(diagonal[group * shape.panels * panel + i * panel + r]);
                        if (alpha != 1)
                            for (int64_t c = 0; c < panel; ++c) row[c] *= T(alpha);
                    }
                    if (i == j) {
                        for (int64_t r0 = 0; r0 < ni; r0 += width) {
                            const int64_t last = least(r0 + width, ni);
                            for (int64_t r = r0; r < last; ++r)
                                for (int64_t c = r + 1; c < last; ++c) to[c * pitch + r] = to[r * pitch + c];
                            if (last < ni) turn(to + r0 * pitch + last, pitch, width, ni - last, to + last * pitch + r0, pitch);
                        }
                    } else {
                        T* const mirrored = i0 == j0 ? straight + (j - j0) * panel * pitch + (i - i0) * panel
                                                     : turned + (j - j0) * panel * pitch + (i - i0) * panel;
                        turn(to, pitch, ni, nj, mirrored, pitch);
                    }
                }
            if (plain && i0 != j0) continue;
            const int64_t rows = least(out.rows, i_last * panel) - i0 * panel, cols = least(out.cols, j_last * panel) - j0 * panel;
            if (i0 == j0 || !out.lower)
                write<T>(rowwise, straight, pitch, rows, cols, T(beta), out, i0 * panel, j0 * panel, stream, out.lower);
            if (i0 != j0) write<T>(rowwise, turned, pitch, cols, rows, T(beta), out, j0 * panel, i0 * panel, stream, false);
        }
    if (stream) rowwise.flush();
}

template void mirror_squares<float>(const Triangle&, int, int, const float*, int64_t, int64_t,
                                    const float*, int64_t, double, double, const Out&, float*);
template void mirror_squares<double>(const Triangle&, int, int, const double*, int64_t,
                                     int64_t, const float*, int64_t, double, double, const Out&, double*);

}  // namespace hvpfast

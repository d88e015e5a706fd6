// The Python module hvpfast.kernels._cpu: arguments are addresses and integers, checked by the launchers in native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "calls.hpp"
#include "kernels.hpp"
#include "tiers.hpp"
#include "workspace.hpp"

namespace py = pybind11;
using namespace hvpfast;

namespace {

Batch batch(uintptr_t data, int dtype, py::handle shape, py::handle strides) {
    const auto read = [](py::handle from, int at) { return int64_t(PyLong_AsLongLong(PyTuple_GET_ITEM(from.ptr(), at))); };
    return {reinterpret_cast<const void*>(data), Dtype(dtype), read(shape, 0), read(shape, 1), read(shape, 2),
            read(strides, 0), read(strides, 1), read(strides, 2)};
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "hvpfast's CPU kernels";
    m.def("tiers", [] {
        py::dict reasons;
        for (Tier tier : {Tier::portable, Tier::avx2, Tier::avx512, Tier::amx}) {
            const std::string reason = tier_missing(tier);
            reasons[tier_name(tier)] = reason.empty() ? py::object(py::none()) : py::object(py::str(reason));
        }
        return reasons;
    }, "Each tier's name, with None where it can run here, else the reason why not.");
    m.def("tier", [] { return tier_name(tier_in_use()); }, "The tier in use.");
    m.def("force_tier", [](py::object name) {
        if (name.is_none()) release_tier();
        else force_tier(tier_from_name(py::cast<std::string>(name)));
    }, py::arg("name"), "Use one tier from now on; None gives the choice back.");
    m.def("allow_threads", [](bool allowed) { threads_allowed = allowed; }, "Whether OpenMP's threads may be used.");
    m.def("workspace_bytes", workspace_bytes, "Bytes of scratch memory that the process's threads hold.");
    m.def("gram", [](uintptr_t x, int dtype, int64_t outer, int64_t inner, int64_t cols, int64_t outer_stride,
                     int64_t inner_stride, int64_t col_stride, bool ones, double alpha, double beta, uintptr_t out,
                     int64_t row_stride, int64_t out_col_stride, bool mirror, int precision, int threads) {
        const Rows rows{reinterpret_cast<const void*>(x), Dtype(dtype), outer, inner, cols, outer_stride, inner_stride, col_stride};
        const int64_t width = cols + ones;
        py::gil_scoped_release release;
        gram(rows, ones, alpha, beta, Out{reinterpret_cast<void*>(out), width, width, row_stride, out_col_stride, !mirror},
             Precision(precision), threads);
    });
    m.def("sample_norms_squared", [](uintptr_t a, py::tuple a_shape, py::tuple a_strides, uintptr_t g, py::tuple g_shape,
                                     py::tuple g_strides, int dtype, uintptr_t out, int precision, int threads) {
        const Batch inputs = batch(a, dtype, a_shape, a_strides), grads = batch(g, dtype, g_shape, g_strides);
        py::gil_scoped_release release;
        sample_norms_squared(inputs, grads, reinterpret_cast<void*>(out), Precision(precision), threads);
    });
    m.def("second_moment", [](uintptr_t a, py::tuple a_shape, py::tuple a_strides, uintptr_t g, py::tuple g_shape,
                              py::tuple g_strides, int dtype, uintptr_t out, py::tuple out_strides, int precision, int threads) {
        const Batch inputs = batch(a, dtype, a_shape, a_strides), grads = batch(g, dtype, g_shape, g_strides);
        const Out sums{reinterpret_cast<void*>(out), grads.features, inputs.features, py::cast<int64_t>(out_strides[0]),
                       py::cast<int64_t>(out_strides[1])};
        py::gil_scoped_release release;
        second_moment(inputs, grads, sums, Precision(precision), threads);
    });
    m.def("sample_grads", [](uintptr_t a, py::tuple a_shape, py::tuple a_strides, uintptr_t g, py::tuple g_shape,
                             py::tuple g_strides, int dtype, uintptr_t out, py::tuple out_strides, int precision, int threads) {
        const Batch inputs = batch(a, dtype, a_shape, a_strides), grads = batch(g, dtype, g_shape, g_strides);
        const Samples samples{reinterpret_cast<void*>(out), py::cast<int64_t>(out_strides[0]), py::cast<int64_t>(out_strides[1]),
                              py::cast<int64_t>(out_strides[2])};
        py::gil_scoped_release release;
        sample_grads(inputs, grads, samples, Precision(precision), threads);
    });
    m.def("softmax_hvp", [](uintptr_t logits, uintptr_t v, uintptr_t weight, int64_t weight_stride, int dtype, int64_t rows,
                            int64_t columns, int64_t classes, uintptr_t out, int threads) {
        const SoftmaxRows x{reinterpret_cast<const void*>(logits), reinterpret_cast<const void*>(v), reinterpret_cast<const void*>(weight),
                            Dtype(dtype), rows, columns, classes, weight_stride};
        py::gil_scoped_release release;
        softmax_hvp(x, reinterpret_cast<void*>(out), threads);
    });
    m.def("activation_rop", [](int kind, uintptr_t x, uintptr_t g, uintptr_t c, int dtype, int64_t count, uintptr_t of_g, uintptr_t of_x, int threads) {
        const auto at = [](uintptr_t from) { return reinterpret_cast<const void*>(from); };
        py::gil_scoped_release release;
        activation_rop(kind, at(x), at(g), at(c), Dtype(dtype), count, reinterpret_cast<float*>(of_g), reinterpret_cast<float*>(of_x), threads);
    });
    // `given`: x, g, c, weight, c_weight, c_bias, mean and rstd; `of`: of g, x and w. Zero: none.
    m.def("norm_rop", [](py::tuple given, int dtype, int64_t rows, int64_t features, py::tuple of, int threads) {
        const auto at = [](const py::tuple& from, size_t index) { return reinterpret_cast<void*>(py::cast<uintptr_t>(from[index])); };
        const NormRows x{at(given, 0), at(given, 1), at(given, 2), at(given, 3), at(given, 4), at(given, 5), at(given, 6), at(given, 7),
                         Dtype(dtype), rows, features};
        void *const of_g = at(of, 0), *const of_x = at(of, 1), *const of_w = at(of, 2);
        py::gil_scoped_release release;
        norm_rop(x, of_g, of_x, of_w, threads);
    });
    // `how`: (kind, eps, mean, rstd, their strides over samples and over positions or features, one pair after the other, by feature).
    m.def("norm_sample_stats", [](uintptr_t x, py::tuple x_shape, py::tuple x_strides, uintptr_t g, py::tuple g_shape, py::tuple g_strides,
                                  int dtype, py::tuple how, uintptr_t norms, uintptr_t squares, int threads) {
        const Batch inputs = batch(x, dtype, x_shape, x_strides), grads = batch(g, dtype, g_shape, g_strides);
        const auto at = [&](int index) { return py::cast<int64_t>(how[size_t(index)]); };
        const Normalised normalised{int(at(0)), py::cast<double>(how[1]), reinterpret_cast<const void*>(py::cast<uintptr_t>(how[2])),
                                    reinterpret_cast<const void*>(py::cast<uintptr_t>(how[3])), at(4), at(5), at(6), at(7), at(8) != 0};
        py::gil_scoped_release release;
        norm_sample_stats(inputs, grads, normalised, reinterpret_cast<void*>(norms), reinterpret_cast<void*>(squares), threads);
    });
    // `axes`: three of (size, kernel, stride, dilation, padding before, positions), unused ones first; `strides` of x.
    m.def("conv_gram", [](uintptr_t x, int dtype, int64_t batch, int64_t groups, int64_t channels, py::tuple axes, py::tuple strides, double alpha,
                          double beta, uintptr_t out, py::tuple out_strides, int precision, int threads, int form) {
        const auto read = [](py::handle from, size_t at) { return int64_t(PyLong_AsLongLong(PyTuple_GET_ITEM(from.ptr(), Py_ssize_t(at)))); };
        Convolution shape{reinterpret_cast<const void*>(x), Dtype(dtype), batch, groups, channels, read(strides, 0), read(strides, 1),
                          {}, {}, {}, {}, {}, {}, {}};
        const size_t unused = 5 - strides.size(), last = out_strides.size() - 1;
        for (size_t d = 0; d < 3; ++d) {
            const py::handle axis = axes[d];
            shape.size[d] = read(axis, 0), shape.kernel[d] = read(axis, 1), shape.stride[d] = read(axis, 2), shape.dilation[d] = read(axis, 3);
            shape.before[d] = read(axis, 4), shape.positions[d] = read(axis, 5);
            shape.space_stride[d] = d < unused ? 0 : read(strides, 2 + d - unused);
        }
        const GroupsOut to{reinterpret_cast<void*>(out), last == 2 ? read(out_strides, 0) : 0, read(out_strides, last - 1), read(out_strides, last)};
        py::gil_scoped_release release;
        conv_gram(shape, alpha, beta, to, Precision(precision), threads, ConvForm(form));
    });
    // x (rows, deep), w (deep, columns), and their strides.
    m.def("matmul", [](uintptr_t x, int64_t x_row, int64_t x_col, uintptr_t w, int64_t w_row, int64_t w_col, uintptr_t bias, uintptr_t out, int64_t out_row,
                       int64_t rows, int64_t deep, int64_t columns, int threads) {
        const Rows left{reinterpret_cast<const void*>(x), Dtype::f32, 1, deep, rows, 0, x_col, x_row};
        const Rows right{reinterpret_cast<const void*>(w), Dtype::f32, 1, deep, columns, 0, w_row, w_col};
        const Out to{reinterpret_cast<void*>(out), rows, columns, out_row, 1};
        py::gil_scoped_release release;
        return matmul(left, right, reinterpret_cast<const float*>(bias), to, threads);
    }, "Whether it was computed.");
    // `axes`: two of (size, kernel, stride, padding, dilation, places).
    m.def("convolve", [](uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t out, bool transposed, int64_t batch, int64_t channels, int64_t features,
                         py::tuple axes, py::tuple x_strides, py::tuple w_strides, int threads) {
        const auto read = [](py::handle from, size_t at) { return int64_t(PyLong_AsLongLong(PyTuple_GET_ITEM(from.ptr(), Py_ssize_t(at)))); };
        Convolved one{reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(w), reinterpret_cast<const float*>(bias), reinterpret_cast<float*>(out),
                      transposed, batch, channels, features, {}, {}, {}, {}, {}, {}, {}, {}};
        for (size_t d = 0; d < 2; ++d) {
            const py::handle axis = axes[d];
            one.size[d] = read(axis, 0), one.kernel[d] = read(axis, 1), one.stride[d] = read(axis, 2), one.padding[d] = read(axis, 3);
            one.dilation[d] = read(axis, 4), one.places[d] = read(axis, 5);
        }
        for (size_t d = 0; d < 3; ++d) one.x_stride[d] = read(x_strides, d);
        for (size_t d = 0; d < 4; ++d) one.w_stride[d] = read(w_strides, d);
        py::gil_scoped_release release;
        return convolve(one, threads);
    }, "Whether it was computed.");
    m.def("gram_slower", [](int64_t rows, int64_t features, bool turned, bool lower, int dtype, int precision) {
        return gram_slower(rows, features, turned, lower, Dtype(dtype), Precision(precision));
    }, "Why torch is as fast at this size, or None.");
    if (!add_calls(m.ptr())) throw py::error_already_set();
    tier_in_use();  // a tier forced by HVPFAST_CPU that cannot run fails the import, saying why
}

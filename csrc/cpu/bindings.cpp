// The Python module hvpfast.kernels._cpu: arguments are addresses and integers, checked by the launchers in native.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

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
    m.def("gram", [](uintptr_t x, int dtype, int64_t outer, int64_t inner, int64_t cols, int64_t outer_stride,
                     int64_t inner_stride, int64_t col_stride, bool ones, double alpha, double beta, uintptr_t out,
                     int64_t row_stride, int64_t out_col_stride, int precision, int threads) {
        const Rows rows{reinterpret_cast<const void*>(x), Dtype(dtype), outer, inner, cols, outer_stride, inner_stride, col_stride};
        const int64_t width = cols + ones;
        py::gil_scoped_release release;
        gram(rows, ones, alpha, beta, Out{reinterpret_cast<void*>(out), width, width, row_stride, out_col_stride},
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
    m.def("conv_gram", [](uintptr_t x, int dtype, int64_t batch, int64_t channels, int64_t batch_stride, int64_t channel_stride,
                          py::tuple axes, double alpha, double beta, uintptr_t out, int64_t row_stride, int64_t col_stride,
                          int precision, int threads) {
        Convolution shape{reinterpret_cast<const void*>(x), Dtype(dtype), batch, channels, batch_stride, channel_stride, {}, {}, {}, {}, {}, {}, {}};
        for (int d = 0; d < 3; ++d) {  // each axis: (size, stride in memory, kernel, stride, dilation, padding before, positions)
            const auto axis = py::cast<std::array<int64_t, 7>>(axes[size_t(d)]);
            shape.size[d] = axis[0], shape.space_stride[d] = axis[1], shape.kernel[d] = axis[2], shape.stride[d] = axis[3];
            shape.dilation[d] = axis[4], shape.before[d] = axis[5], shape.positions[d] = axis[6];
        }
        const int64_t width = channels * shape.offsets();
        py::gil_scoped_release release;
        conv_gram(shape, alpha, beta, Out{reinterpret_cast<void*>(out), width, width, row_stride, col_stride}, Precision(precision), threads);
    });
    tier_in_use();  // a tier forced by HVPFAST_CPU that cannot run fails the import, saying why
}

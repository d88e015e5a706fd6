// Python module hvpfast.kernels._cuda. Pointers and the stream arrive as integers; kernels/native.py owns the tensors.
#include <pybind11/pybind11.h>

#include "gram.hpp"

namespace py = pybind11;

namespace {

void gram(uintptr_t x, int dtype, int64_t rows, int64_t width, int64_t stride_n, int64_t stride_d, uintptr_t out,
          int64_t out_stride_i, int64_t out_stride_j, float alpha, float beta, bool ones_column, uintptr_t workspace,
          int splits, int device, uintptr_t stream) {
    if (rows < 0 || width < 0 || splits < 1 || splits > 65535) {
        throw std::invalid_argument("gram: rows, width and splits must be at least 0, 0 and 1");
    }
    py::gil_scoped_release release;
    hvpfast::gram({reinterpret_cast<const void*>(x), static_cast<hvpfast::Dtype>(dtype), rows, width, stride_n, stride_d,
                   reinterpret_cast<float*>(out), out_stride_i, out_stride_j, alpha, beta, ones_column,
                   reinterpret_cast<float*>(workspace), splits, device, stream});
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of hvpfast: raw pointers, extents, strides and a stream in; nothing is allocated or waited for.";
    m.def("gram_tile", &hvpfast::gram_tile, "Side of the tiles of the result.");
    m.def("gram_workspace", &hvpfast::gram_workspace, py::arg("width"), py::arg("ones_column"), py::arg("splits"),
          "Floats of workspace that gram needs.");
    m.def("gram", &gram, py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("width"), py::arg("stride_n"),
          py::arg("stride_d"), py::arg("out"), py::arg("out_stride_i"), py::arg("out_stride_j"), py::arg("alpha"),
          py::arg("beta"), py::arg("ones_column"), py::arg("workspace"), py::arg("splits"), py::arg("device"),
          py::arg("stream"), "out = beta out + alpha (x 1)'(x 1) on the given stream.");
}

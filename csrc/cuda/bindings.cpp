// Python module hvpfast.kernels._cuda. Pointers and the stream arrive as integers; kernels/native.py owns the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cg.hpp"
#include "gram.hpp"
#include "krylov.hpp"

namespace py = pybind11;

namespace {

void gram(uintptr_t x, int dtype, int64_t rows, int64_t width, int64_t stride_n, int64_t stride_d, uintptr_t out,
          int64_t out_stride_i, int64_t out_stride_j, float alpha, float beta, bool ones_column, bool mirror,
          uintptr_t workspace, int products, uintptr_t halves, int splits, int device, uintptr_t stream) {
    if (rows < 0 || width < 0 || splits < 1 || splits > 65535) {
        throw std::invalid_argument("gram: rows, width and splits must be at least 0, 0 and 1");
    }
    if (products != 0 && ((products != 1 && products != 3) || rows == 0 || width == 0 || rows >> 31 || width >> 31)) {
        throw std::invalid_argument("gram: products must be 0, 1 or 3, and x not empty and below 2^31 on a side unless 0");
    }
    py::gil_scoped_release release;
    hvpfast::gram({reinterpret_cast<const void*>(x), static_cast<hvpfast::Dtype>(dtype), rows, width, stride_n, stride_d,
                   reinterpret_cast<float*>(out), out_stride_i, out_stride_j, alpha, beta, ones_column, mirror,
                   reinterpret_cast<float*>(workspace), products, reinterpret_cast<void*>(halves), splits, device,
                   stream});
}

void reorthogonalize(const std::vector<int64_t>& places, int dtype, int64_t count, uintptr_t coefficients, uintptr_t norm,
                     bool normalize, uintptr_t workspace, int blocks, int device, uintptr_t stream) {
    if (places.size() % 7 != 0 || count < 0 || blocks < 1) {
        throw std::invalid_argument("reorthogonalize: places are 7 numbers a tensor, count and blocks at least 0 and 1");
    }
    py::gil_scoped_release release;
    hvpfast::reorthogonalize({places.data(), static_cast<int>(places.size() / 7), static_cast<hvpfast::Dtype>(dtype), count,
                              reinterpret_cast<double*>(coefficients), reinterpret_cast<double*>(norm), normalize,
                              reinterpret_cast<double*>(workspace), blocks, device, stream});
}

void cg_update(const std::vector<int64_t>& places, int dtype, int columns, uintptr_t rz, double damping, uintptr_t curvature,
               uintptr_t rr, uintptr_t workspace, int blocks, int device, uintptr_t stream) {
    if (places.size() % 8 != 0 || columns < 1 || columns > hvpfast::cg_columns() || blocks < 1) {
        throw std::invalid_argument("cg_update: places are 8 numbers a tensor, columns from 1 to cg_columns(), blocks from 1 on");
    }
    py::gil_scoped_release release;
    hvpfast::cg_update({places.data(), static_cast<int>(places.size() / 8), static_cast<hvpfast::Dtype>(dtype), columns,
                        reinterpret_cast<const double*>(rz), damping, reinterpret_cast<double*>(curvature),
                        reinterpret_cast<double*>(rr), reinterpret_cast<double*>(workspace), blocks, device, stream});
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of hvpfast: raw pointers, extents, strides and a stream in; nothing is allocated or waited for.";
    m.def("gram_tile", &hvpfast::gram_tile, "Side of the tiles of the result.");
    m.def("gram_workspace", &hvpfast::gram_workspace, py::arg("width"), py::arg("ones_column"), py::arg("splits"),
          "Floats of workspace that gram needs.");
    m.def("gram_halves", &hvpfast::gram_halves, py::arg("rows"), py::arg("width"), py::arg("products"),
          "bf16 numbers of workspace that gram needs for float32 data where products is not 0.");
    m.def("gram", &gram, py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("width"), py::arg("stride_n"),
          py::arg("stride_d"), py::arg("out"), py::arg("out_stride_i"), py::arg("out_stride_j"), py::arg("alpha"),
          py::arg("beta"), py::arg("ones_column"), py::arg("mirror"), py::arg("workspace"), py::arg("products"), py::arg("halves"), py::arg("splits"),
          py::arg("device"), py::arg("stream"), "out = beta out + alpha (x 1)'(x 1) on the given stream.");
    m.def("cg_columns", &hvpfast::cg_columns, "The most systems that cg_update takes together.");
    m.def("cg_workspace", &hvpfast::cg_workspace, py::arg("tensors"), py::arg("columns"), py::arg("blocks"),
          "Doubles of workspace that cg_update needs.");
    m.def("cg_update", &cg_update, py::arg("places"), py::arg("dtype"), py::arg("columns"), py::arg("rz"), py::arg("damping"),
          py::arg("curvature"), py::arg("rr"), py::arg("workspace"), py::arg("blocks"), py::arg("device"), py::arg("stream"),
          "One iteration of conjugate gradients on the given stream; places: (x, r, p, q, new x, new r, new p, elements) a tensor.");
    m.def("krylov_chunk", &hvpfast::krylov_chunk, "Elements of a vector that a block takes at a time.");
    m.def("reorthogonalize_workspace", &hvpfast::reorthogonalize_workspace, py::arg("pieces"), py::arg("count"),
          py::arg("blocks"), "Doubles of workspace that reorthogonalize needs.");
    m.def("reorthogonalize", &reorthogonalize, py::arg("places"), py::arg("dtype"), py::arg("count"), py::arg("coefficients"),
          py::arg("norm"), py::arg("normalize"), py::arg("workspace"), py::arg("blocks"), py::arg("device"), py::arg("stream"),
          "rest = w minus its part in V's rows; places: (w, stride, V, strides, rest, length) a tensor.");
}

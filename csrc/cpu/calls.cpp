// What a call from Python passes before a kernel runs, in tenths of a microsecond: whether a kernel may touch the arguments
// (`plain`), whether these fit together (`fits`), and calls of `gram` as a whole (`gram_call`). They answer for the usual case
// only, and leave every other one, errors included, to hvpfast.
//
// A tensor's address, sizes and strides come from DLPack's C exchange functions, which torch offers from 2.10 on: one call
// instead of five attributes, and no header of torch's.
#include "calls.hpp"

#include <exception>
#include <initializer_list>

#include "kernels.hpp"

namespace hvpfast {
namespace {

// DLPack's structures, version 1: https://dmlc.github.io/dlpack/latest/c_api.html
struct View {
    char* data;
    int32_t device_type, device_id, axes;
    uint8_t kind, bits;
    uint16_t lanes;
    const int64_t *shape, *strides;
    uint64_t offset;  // in bytes
};

struct Exchange {
    uint32_t major, minor;
    void *previous, *allocate, *own, *give;
    int (*view)(void* tensor, View* to);
    void* stream;
};

constexpr int32_t kHost = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

// Objects of torch that are asked again and again, kept as long as the process; null until `learn` has been called.
struct Known {
    PyObject *tensor, *parameter, *strided, *float32;
    PyObject *transform, *modes, *tracing, *backward, *grad_enabled, *batched, *negative, *increment, *threads, *product, *autocast;
    PyObject* forward_ad;  // the module's namespace, which holds the level
    const Exchange* exchange;
    PyObject *requires_grad, *layout, *level, *new_empty, *dtype, *transposed, *out, *alpha, *beta, *ones, *mirror, *automatic;  // names
    PyObject *to_float32, *into;  // ("dtype",) and ("out",): the names of keyword arguments of new_empty and of mm
};
Known known{};

// A reference that is given back.
struct Held {
    PyObject* at;
    explicit Held(PyObject* object) : at(object) {}
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;
    ~Held() { Py_XDECREF(at); }
};

bool is(PyObject* made, PyObject* what) {
    const Held held(made);
    if (made == nullptr) PyErr_Clear();
    return made == what;
}

// What an integer object holds, else `otherwise`.
long number(PyObject* object, long otherwise) {
    if (object == nullptr || !PyLong_Check(object)) return PyErr_Clear(), otherwise;
    const long value = PyLong_AsLong(object);
    return value == -1 && PyErr_Occurred() ? PyErr_Clear(), otherwise : value;
}

long called(PyObject* function, long otherwise) {
    const Held held(PyObject_CallNoArgs(function));
    return number(held.at, otherwise);
}

// No transform, tracer, mode or forward-mode level that only the reference may serve.
bool unwatched() {
    return is(PyObject_CallNoArgs(known.transform), Py_None) && number(PyDict_GetItem(known.forward_ad, known.level), 0) < 0 &&
           called(known.modes, 1) == 0 && is(PyObject_CallNoArgs(known.tracing), Py_None);
}

bool is_tensor(PyObject* x) { return Py_TYPE(x) == (PyTypeObject*)known.tensor || Py_TYPE(x) == (PyTypeObject*)known.parameter; }

// Whether a tensor of those types, strided, may be read or written; `backward`: a backward pass is running.
bool is_plain(PyObject* x, bool backward) {
    if (!is(PyObject_GetAttr(x, known.requires_grad), Py_False) && !is(PyObject_CallNoArgs(known.grad_enabled), Py_False)) return false;
    if (!is(PyObject_Vectorcall(known.negative, &x, 1, nullptr), Py_False)) return false;
    return !backward || is(PyObject_Vectorcall(known.batched, &x, 1, nullptr), Py_False);
}

bool is_plain_value(PyObject* x, bool backward, bool inside) {
    if (is_tensor(x)) return is(PyObject_GetAttr(x, known.layout), known.strided) && is_plain(x, backward);
    if (x == Py_None || PyFloat_CheckExact(x) || PyLong_CheckExact(x) || PyBool_Check(x) || PyUnicode_CheckExact(x)) return true;
    if (!inside && (PyList_CheckExact(x) || PyTuple_CheckExact(x))) {
        for (Py_ssize_t at = 0; at < PySequence_Fast_GET_SIZE(x); ++at)
            if (!is_plain_value(PySequence_Fast_GET_ITEM(x, at), backward, true)) return false;
        return true;
    }
    return false;
}

// plain(args, kwargs): True if a kernel may touch all of them; False: ask dispatch, which knows the reasons.
PyObject* plain(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != 2 || known.tensor == nullptr || !PyTuple_CheckExact(given[0]) || !PyDict_CheckExact(given[1]) || !unwatched())
        return Py_NewRef(Py_False);
    const bool backward = called(known.backward, 0) != -1;
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(given[0]); ++at)
        if (!is_plain_value(PyTuple_GET_ITEM(given[0], at), backward, false)) return Py_NewRef(Py_False);
    Py_ssize_t position = 0;
    PyObject *name, *value;
    while (PyDict_Next(given[1], &position, &name, &value))
        if (!is_plain_value(value, backward, false)) return Py_NewRef(Py_False);
    return Py_NewRef(Py_True);
}

bool viewed(PyObject* x, View& view) {
    if (known.exchange->view(x, &view) == 0) return view.device_type == kHost && view.lanes == 1;
    PyErr_Clear();
    return false;
}

bool dtype_of(const View& x, Dtype& dtype) {
    if (x.kind == kFloat && (x.bits == 32 || x.bits == 64 || x.bits == 16))
        dtype = x.bits == 32 ? Dtype::f32 : x.bits == 64 ? Dtype::f64 : Dtype::f16;
    else if (x.kind == kBfloat && x.bits == 16) dtype = Dtype::bf16;
    else return false;
    return true;
}

// fits("nti,mto,oi", a, g, w): whether all are floating tensors of one dtype on the CPU, their axes of the sizes that the letters
// stand for, and m a multiple of n. False: ask the op's own check, which knows the reasons.
PyObject* fits(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count < 2 || known.exchange == nullptr) return Py_NewRef(Py_False);
    const char* letter = PyUnicode_AsUTF8(given[0]);
    if (letter == nullptr) return nullptr;
    int64_t sizes[128];
    for (int64_t& size : sizes) size = -1;
    Dtype first{}, dtype{};
    for (Py_ssize_t at = 1; at < count; ++at) {
        View x;
        if (!is_tensor(given[at]) || !viewed(given[at], x) || !dtype_of(x, dtype) || (at > 1 && dtype != first)) return Py_NewRef(Py_False);
        first = dtype;
        int32_t axis = 0;
        for (; *letter != 0 && *letter != ','; ++letter, ++axis) {
            int64_t& size = sizes[*letter & 127];
            if (axis >= x.axes || (size >= 0 && size != x.shape[axis])) return Py_NewRef(Py_False);
            size = x.shape[axis];
        }
        if (axis != x.axes) return Py_NewRef(Py_False);
        letter += *letter == ',';
    }
    const int64_t m = sizes[int('m')], n = sizes[int('n')];
    return Py_NewRef(n > 0 && m >= 0 && m % n != 0 ? Py_False : n == 0 && m > 0 ? Py_False : Py_True);
}

// x (..., I), at most three axes and some values, as rows.
bool rows_of(const View& x, Rows& rows) {
    if (x.axes < 1 || x.axes > 3 || !dtype_of(x, rows.dtype)) return false;
    const int64_t *const size = x.shape, *const stride = x.strides, last = x.axes - 1;
    rows.data = x.data + x.offset;
    rows.cols = size[last], rows.col_stride = size[last] == 1 ? 1 : stride[last];
    rows.outer = rows.inner = 1, rows.outer_stride = 0, rows.inner_stride = rows.cols;
    if (last == 1) rows.inner = size[0], rows.inner_stride = stride[0];
    if (last == 2) {
        rows.inner = size[1], rows.inner_stride = stride[1];
        if (size[1] == 1) rows.inner = size[0], rows.inner_stride = stride[0];
        else if (stride[0] == size[1] * stride[1]) rows.inner *= size[0];
        else rows.outer = size[0], rows.outer_stride = stride[0];
    }
    return rows.outer > 0 && rows.inner > 0 && rows.cols > 0;
}

bool out_of(const View& x, bool wide, int64_t width, Out& out) {
    if (x.axes != 2 || x.kind != kFloat || x.bits != (wide ? 64 : 32) || x.shape[0] != width || x.shape[1] != width) return false;
    out = {x.data + x.offset, width, width, x.strides[0], x.strides[1]};
    return width == 1 || (out.row_stride != 0 && out.col_stride != 0);
}

bool factor(PyObject* x, double& to) {
    if (!PyFloat_CheckExact(x) && !PyLong_CheckExact(x)) return false;
    to = PyFloat_AsDouble(x);
    return !(to == -1 && PyErr_Occurred()) || (PyErr_Clear(), false);
}

// x.new_empty(width, width), in the dtype of the sums.
PyObject* new_square(PyObject* x, int64_t width, bool convert) {
    const Held size(PyLong_FromLongLong(width));
    if (size.at == nullptr) return nullptr;
    PyObject* given[] = {x, size.at, size.at, known.float32};
    return PyObject_VectorcallMethod(known.new_empty, given, 3, convert ? known.to_float32 : nullptr);
}

// torch's own product, where nothing else is asked for: what gram's reference comes to.
PyObject* torch_product(PyObject* x, PyObject* out) {
    const Held turned(PyObject_CallMethodNoArgs(x, known.transposed));
    if (turned.at == nullptr) return nullptr;
    PyObject* given[] = {turned.at, x, out};
    return PyObject_Vectorcall(known.product, given, 2, out == nullptr ? nullptr : known.into);
}

constexpr int64_t kShort = int64_t(1) << 20;  // products up to which it is not worth letting other threads run meanwhile

// gram_call(args, kwargs, precision): what gram(*args, **kwargs) returns; NotImplemented: ask dispatch.
PyObject* gram_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
    PyObject* const other = Py_NotImplemented;
    if (count != 3 || known.exchange == nullptr || PyTuple_GET_SIZE(given[0]) != 1) return Py_NewRef(other);
    PyObject *const x = PyTuple_GET_ITEM(given[0], 0), *out = Py_None, *name, *value;
    double alpha = 1, beta = 0;
    bool ones = false, mirror = true;
    Py_ssize_t position = 0;
    while (PyDict_Next(given[1], &position, &name, &value)) {
        if (name == known.out) out = value;
        else if (name == known.ones && PyBool_Check(value)) ones = value == Py_True;
        else if (name == known.mirror && PyBool_Check(value)) mirror = value == Py_True;
        else if (!(name == known.alpha && factor(value, alpha)) && !(name == known.beta && factor(value, beta))) return Py_NewRef(other);
    }
    const bool given_out = out != Py_None;
    if (!is_tensor(x) || (given_out ? !is_tensor(out) : beta != 0 || !mirror)) return Py_NewRef(other);
    Precision precision = Precision::automatic;
    if (given[2] != known.automatic) {
        int found = 0;
        for (const char* const each : {"auto", "ieee", "bf16x3", "bf16"}) {
            if (PyUnicode_CompareWithASCIIString(given[2], each) == 0) break;
            ++found;
        }
        if (found == 4) return Py_NewRef(other);
        precision = Precision(found);
    }
    View view_of_x, view;
    Rows rows;
    Out to{};
    if (!viewed(x, view_of_x) || !rows_of(view_of_x, rows)) return Py_NewRef(other);
    const bool wide = rows.dtype == Dtype::f64;
    const int64_t width = rows.cols + ones;
    if (given_out && (!viewed(out, view) || !out_of(view, wide, width, to))) return Py_NewRef(other);
    const bool turned = rows.col_stride != 1 && view_of_x.axes == 2 && rows.inner_stride == 1;
    const bool slower = gram_slower(rows.rows(), rows.cols, turned, !mirror, rows.dtype, precision) != nullptr;
    if (slower) {
        const bool as_it_is = view_of_x.axes == 2 && int(rows.dtype) < 2 && !ones && mirror && alpha == 1 && beta == 0;
        if (!as_it_is || (given_out && !apart(rows, to)) || !is(PyObject_CallNoArgs(known.autocast), Py_False)) return Py_NewRef(other);
    }
    to.lower = !mirror;
    if (!unwatched()) return Py_NewRef(other);
    const bool backward = called(known.backward, 0) != -1;
    if (!is_plain(x, backward) || (given_out && !is_plain(out, backward))) return Py_NewRef(other);

    if (slower) return torch_product(x, given_out ? out : nullptr);

    const Held made(given_out ? Py_NewRef(out) : new_square(x, width, rows.dtype != Dtype::f32 && !wide));
    if (made.at == nullptr) return nullptr;
    if (!given_out && (!viewed(made.at, view) || !out_of(view, wide, width, to))) return Py_NewRef(other);
    const int64_t products = rows.rows() * width * width;
    const int threads = products < (1 << 15) ? 1 : int(called(known.threads, 1));
    try {
        if (products <= kShort) gram(rows, ones, alpha, beta, to, precision, threads);
        else {
            struct Released {
                PyThreadState* state = PyEval_SaveThread();
                ~Released() { PyEval_RestoreThread(state); }
            } released;
            gram(rows, ones, alpha, beta, to, precision, threads);
        }
    } catch (const std::exception& error) {
        return PyErr_SetString(PyExc_RuntimeError, error.what()), nullptr;
    }
    if (given_out) {  // autograd learns that it was written, as it would of any in-place operation
        const Held written(PyTuple_Pack(1, out));
        const Held done(written.at == nullptr ? nullptr : PyObject_Vectorcall(known.increment, &written.at, 1, nullptr));
        if (done.at == nullptr) return nullptr;
    }
    return Py_NewRef(made.at);
}

// learn(objects): the objects of torch by the names in `Known`, and its DLPack exchange functions (None: it has none).
PyObject* learn(PyObject*, PyObject* objects) {
    Known found{};
    const struct {
        const char* name;
        PyObject** to;
    } wanted[] = {
        {"tensor", &found.tensor}, {"parameter", &found.parameter}, {"strided", &found.strided}, {"float32", &found.float32},
        {"transform", &found.transform}, {"modes", &found.modes}, {"tracing", &found.tracing}, {"backward", &found.backward},
        {"grad_enabled", &found.grad_enabled}, {"batched", &found.batched}, {"negative", &found.negative},
        {"increment", &found.increment}, {"threads", &found.threads}, {"product", &found.product}, {"autocast", &found.autocast}, {"forward_ad", &found.forward_ad},
    };
    for (const auto& each : wanted) {
        *each.to = PyDict_GetItemString(objects, each.name);
        if (*each.to == nullptr) return PyErr_Format(PyExc_KeyError, "learn: %s is missing", each.name);
    }
    PyObject* const exchange = PyDict_GetItemString(objects, "exchange");
    if (exchange != nullptr && PyCapsule_IsValid(exchange, "dlpack_exchange_api")) {
        found.exchange = static_cast<const Exchange*>(PyCapsule_GetPointer(exchange, "dlpack_exchange_api"));
        if (found.exchange->major != 1) found.exchange = nullptr;
    }
    const struct {
        const char* name;
        PyObject** to;
    } names[] = {
        {"requires_grad", &found.requires_grad}, {"layout", &found.layout}, {"_current_level", &found.level}, {"new_empty", &found.new_empty},
        {"dtype", &found.dtype}, {"t", &found.transposed}, {"out", &found.out}, {"alpha", &found.alpha}, {"beta", &found.beta}, {"ones_column", &found.ones},
        {"mirror", &found.mirror}, {"auto", &found.automatic},
    };
    for (const auto& each : names)
        if ((*each.to = PyUnicode_InternFromString(each.name)) == nullptr) return nullptr;
    if ((found.to_float32 = PyTuple_Pack(1, found.dtype)) == nullptr) return nullptr;
    if ((found.into = PyTuple_Pack(1, found.out)) == nullptr) return nullptr;
    Py_INCREF(objects);  // for good: it holds all of them
    known = found;
    return Py_NewRef(Py_None);
}

PyMethodDef functions[] = {
    {"learn", learn, METH_O, "The objects of torch that the calls below ask."},
    {"plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(plain)), METH_FASTCALL, "plain(args, kwargs): whether a kernel may touch them."},
    {"fits", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(fits)), METH_FASTCALL, "fits(letters, *tensors): whether their axes are so."},
    {"gram_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(gram_call)), METH_FASTCALL,
     "gram_call(args, kwargs, precision): gram's result, or NotImplemented where dispatch must be asked."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_calls(PyObject* module) { return PyModule_AddFunctions(module, functions) == 0; }

}  // namespace hvpfast

// What Python functions of this module need where pybind11's conversions would cost more than the work.
#pragma once

#include <Python.h>

namespace hvpfast {

// Adds `learn`, `plain`, `fits` and `gram_call` to the module; false with a Python error set.
bool add_calls(PyObject* module);

}  // namespace hvpfast

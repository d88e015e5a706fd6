// The kernels, as the bindings call them: arguments are valid (native.py has checked them).
#pragma once

#include "common.hpp"

namespace hvpfast {

// out = beta out + alpha x'x, (x 1)'(x 1) with `ones`; out is not read if beta is 0.
void gram(const Rows& x, bool ones, double alpha, double beta, const Out& out, Precision precision, int threads);

}  // namespace hvpfast

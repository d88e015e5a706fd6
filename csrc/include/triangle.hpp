// Symmetric products in squares of one panel each, upper triangle only: square (i, j), i <= j, is panel x panel
// elements, row-major and contiguous, so that the whole triangle is streamed in order.
#pragma once

#include "common.hpp"

namespace hvpfast {

struct Triangle {
    int64_t panel, panels;
    int64_t squares() const { return panels * (panels + 1) / 2; }
    int64_t at(int64_t i, int64_t j) const { return (j * (j + 1) / 2 + i) * panel * panel; }
    int64_t elements() const { return squares() * panel * panel; }
};

// Writes squares [first, last) of the triangle (numbered j (j + 1) / 2 + i) and their mirror images:
// out = beta out + alpha sum_t copies[t], `copies` lying `apart` elements from each other. `diagonal` (or null) holds
// `groups` rows of panels * panel values that are added to the diagonal.
template <class T>
void mirror_squares(const Triangle& shape, int64_t first, int64_t last, const T* squares, int64_t copies, int64_t apart,
                    const float* diagonal, int64_t groups, double alpha, double beta, const Out& out);

}  // namespace hvpfast

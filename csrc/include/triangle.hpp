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
    // Panels along the side of a patch, which is put together in L2 and leaves in rows of about a kilobyte: a result
    // beyond the caches is written past them, and pieces of a panel's width fill memory at half the rate.
    int64_t patch(int64_t element_bytes) const {
        const int64_t features = panel * panels;
        return features * features * element_bytes > (int64_t(8) << 20) ? most(1, 1024 / element_bytes / panel) : 1;
    }
    int64_t patch_elements(int64_t element_bytes) const { return 2 * patch(element_bytes) * patch(element_bytes) * panel * panel; }
};

// Writes thread `index`'s share of the triangle and of its mirror image (with out.lower of that alone): out = beta out + alpha sum_t copies[t], `copies`
// lying `apart` elements from each other. `diagonal` (or null) holds `groups` rows of panels * panel values that are added
// to the diagonal. `scratch`: patch_elements(sizeof(T)).
template <class T>
void mirror_squares(const Triangle& shape, int index, int count, const T* squares,
                    int64_t copies, int64_t apart, const float* diagonal, int64_t groups, double alpha, double beta, const Out& out,
                    T* scratch);

}  // namespace hvpfast

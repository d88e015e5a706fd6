// The lower triangle of tiles, row after row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hvpfast {

struct Place {
    int row, column;
};

// Position of the index-th tile; the root may be one off either way.
inline __device__ Place triangle(int index) {
    int row = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
    while (static_cast<int64_t>(row) * (row + 1) / 2 > index) --row;
    while (static_cast<int64_t>(row + 1) * (row + 2) / 2 <= index) ++row;
    return {row, static_cast<int>(index - static_cast<int64_t>(row) * (row + 1) / 2)};
}

}  // namespace hvpfast

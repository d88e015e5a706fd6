// Codes of the data's types, the same as on the Python side and for the CPU kernels.
#pragma once

namespace hvpfast {

enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

}  // namespace hvpfast

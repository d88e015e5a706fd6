// Conversions of 16-bit floats, one value at a time.
#pragma once

#include <cstring>

#include "common.hpp"

namespace hvpfast {

HVPFAST_INLINE float bf16_to_float(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

HVPFAST_INLINE float f16_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16;
    uint32_t exponent = (bits >> 10) & 31, fraction = bits & 0x3ff, wide;
    if (exponent == 31) {
        wide = sign | 0x7f800000u | (fraction << 13);
    } else if (exponent != 0) {
        wide = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {  // zero or subnormal: fraction * 2^-24, exact in float32
        const float magnitude = float(fraction) * 5.9604644775390625e-8f;
        std::memcpy(&wide, &magnitude, 4);
        wide |= sign;
    }
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

}  // namespace hvpfast

#pragma once
#include <cstdint>
#include <cstring>
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {  // to nearest even; a NaN stays one
        uint32_t all;
        std::memcpy(&all, &x, 4);
        bits = static_cast<uint16_t>(x == x ? (all + 0x7FFF + (all >> 16 & 1)) >> 16 : 0x7FFF);
    }
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t all = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &all, 4);
    return value;
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }

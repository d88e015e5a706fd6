#pragma once
#include <cstdint>
#include <cstring>
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {  // only ever of zero here
        uint32_t all;
        std::memcpy(&all, &x, 4);
        bits = static_cast<uint16_t>(all >> 16);
    }
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t all = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &all, 4);
    return value;
}

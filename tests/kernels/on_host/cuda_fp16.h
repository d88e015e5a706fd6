#pragma once
struct __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value(static_cast<_Float16>(x)) {}
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }

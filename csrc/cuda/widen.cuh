// The types of data: from codes to types, and from numbers of every type to the type that is summed in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "dtype.hpp"

namespace hvpfast {

inline __device__ float widen(float x) { return x; }
inline __device__ double widen(double x) { return x; }
inline __device__ float widen(__half x) { return __half2float(x); }
inline __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T, Dtype CODE>
struct Coded {
    using type = T;
    static constexpr Dtype code = CODE;
};

template <class T>
struct Type;
template <>
struct Type<float> : Coded<float, Dtype::float32> {};
template <>
struct Type<double> : Coded<double, Dtype::float64> {};
template <>
struct Type<__nv_bfloat16> : Coded<__nv_bfloat16, Dtype::bfloat16> {};
template <>
struct Type<__half> : Coded<__half, Dtype::float16> {};

// Calls run(Type<T>{}) for the T among Types that a code stands for.
template <class... Types, class Run>
void with_type(Dtype dtype, const char* who, Run run) {
    const bool known = ((dtype == Type<Types>::code && (run(Type<Types>{}), true)) || ...);
    if (!known) throw std::runtime_error(std::string(who) + ": an unknown dtype code");
}

}  // namespace hvpfast

// Numbers of every type to the type that is summed in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace hvpfast {

inline __device__ float widen(float x) { return x; }
inline __device__ double widen(double x) { return x; }
inline __device__ float widen(__half x) { return __half2float(x); }
inline __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

}  // namespace hvpfast

// As much of CUDA as csrc/cuda needs, on the host: a block is that many threads with a barrier, and blocks run one after
// another, so that __shared__ can be static. Says whether a kernel's places, ranges and barriers are right; nothing of speed.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
using std::min;

struct uint4 {
    unsigned x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx;
inline dim3 gridDim, blockDim;
inline std::barrier<>* barrier_of_block;
inline void __syncthreads() { barrier_of_block->arrive_and_wait(); }

// A warp's exchange: each lane leaves its value, and reads another's once all have.
struct Warp {
    std::barrier<> barrier;
    double values[32];
};
inline thread_local Warp* warp;
inline thread_local unsigned lane_of_warp;
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned apart) {
    warp->values[lane_of_warp] = static_cast<double>(value);
    warp->barrier.arrive_and_wait();
    const T other = lane_of_warp + apart < 32 ? static_cast<T>(warp->values[lane_of_warp + apart]) : value;
    warp->barrier.arrive_and_wait();
    return other;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    return bytes <= 227 * 1024 ? cudaSuccess : static_cast<cudaError_t>(1);
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

// What `kernel<<<grid, block, 0, stream>>>(...)` is rewritten to.
template <typename Kernel>
void launch(dim3 grid, dim3 block, Kernel kernel) {
    gridDim = grid, blockDim = block;
    const unsigned count = block.x * block.y;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            std::barrier<> barrier(count);
            barrier_of_block = &barrier;
            std::vector<std::unique_ptr<Warp>> warps;
            for (unsigned w = 0; w < count; w += 32) warps.emplace_back(new Warp{std::barrier<>(min(32u, count - w)), {}});
            std::vector<std::thread> threads;
            for (unsigned t = 0; t < count; ++t) {
                threads.emplace_back([&barrier, &kernel, &warps, block, x, y, t] {
                    blockIdx = dim3(x, y), threadIdx = dim3(t % block.x, t / block.x);
                    warp = warps[t / 32].get(), lane_of_warp = t % 32;
                    kernel();
                    warp->barrier.arrive_and_drop();
                    barrier.arrive_and_drop();
                });
            }
            for (auto& thread : threads) thread.join();
        }
    }
}

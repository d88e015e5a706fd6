// As much of CUDA as csrc/cuda needs, on the host: a block's threads are contexts that take turns, each until it has to wait, in
// an order drawn anew (and the same in every run) for every round, so that a barrier that is not there shows. Blocks run one
// after another: __shared__ can be static. Says whether a kernel's places, ranges and barriers are right; nothing of speed.
#pragma once
#undef _FORTIFY_SOURCE  // which takes a jump to another stack for a mistake
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
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
inline dim3 gridDim, blockDim, blockIdx;

// Those who wait for each other; one that is done is waited for no more.
struct Barrier {
    unsigned members, arrived = 0, phase = 0;
    void release() {
        if (arrived == members) arrived = 0, ++phase;
    }
};

struct Warp {
    Barrier barrier;
    double values[32];
};

struct Thread {
    dim3 index;
    unsigned lane;
    Warp* warp;
    std::function<bool()> ready;  // what it waits for; empty: nothing
    std::shared_ptr<void> own;    // whatever else is one thread's
    std::exception_ptr failure;
    bool begun, done;
    ucontext_t context;  // to begin in
    jmp_buf at;          // to go on at: without the system calls of swapcontext
    std::vector<char> stack;
};
inline Thread* current;
inline jmp_buf scheduler;
#define threadIdx (current->index)

inline void wait_until(std::function<bool()> ready) {
    current->ready = std::move(ready);
    if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}
inline void wait(Barrier& barrier) {
    const unsigned phase = barrier.phase;
    ++barrier.arrived, barrier.release();
    if (barrier.phase == phase) wait_until([&barrier, phase] { return barrier.phase != phase; });
}
inline Barrier barrier_of_block;
inline void __syncthreads() { wait(barrier_of_block); }

// A warp's exchange: each lane leaves its value, and reads another's once all have.
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned apart) {
    Warp& warp = *current->warp;
    const unsigned lane = current->lane;
    warp.values[lane] = static_cast<double>(value);
    wait(warp.barrier);
    const T other = lane + apart < 32 ? static_cast<T>(warp.values[lane + apart]) : value;
    wait(warp.barrier);
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

inline const std::function<void()>* running;
inline void run_thread() {
    try {
        (*running)();
    } catch (...) {
        current->failure = std::current_exception();
    }
    for (Barrier* one : {&current->warp->barrier, &barrier_of_block}) --one->members, one->release();
    current->done = true;
    _longjmp(scheduler, 1);
}
inline void go_on(Thread& one) {
    current = &one;
    if (_setjmp(scheduler) != 0) return;  // it waits, or is done
    if (one.begun) _longjmp(one.at, 1);
    one.begun = true;
    setcontext(&one.context);
}

inline void run_block(dim3 block, std::vector<Thread>& threads, std::mt19937& drawn) {
    const unsigned count = block.x * block.y;
    std::vector<Warp> warps((count + 31) / 32);
    for (unsigned w = 0; w < warps.size(); ++w) warps[w].barrier = {min(32u, count - 32 * w)};
    barrier_of_block = {count};
    std::vector<Thread*> left;
    for (unsigned t = 0; t < count; ++t) {
        Thread& one = threads[t];
        one.index = dim3(t % block.x, t / block.x), one.lane = t % 32, one.warp = &warps[t / 32];
        one.ready = nullptr, one.own = nullptr, one.failure = nullptr, one.begun = one.done = false;
        one.stack.resize(128 * 1024);
        getcontext(&one.context);
        one.context.uc_stack.ss_sp = one.stack.data(), one.context.uc_stack.ss_size = one.stack.size();
        one.context.uc_link = nullptr;
        makecontext(&one.context, run_thread, 0);
        left.push_back(&one);
    }
    while (!left.empty()) {
        std::shuffle(left.begin(), left.end(), drawn);
        bool moved = false;
        for (Thread* one : left) {
            if (one->ready && !one->ready()) continue;
            one->ready = nullptr, moved = true;
            go_on(*one);
            if (one->failure) std::rethrow_exception(one->failure);
        }
        if (!moved) throw std::runtime_error("all threads of a block wait, for what none of them will do");
        left.erase(std::remove_if(left.begin(), left.end(), [](Thread* one) { return one->done; }), left.end());
    }
}

// What `kernel<<<grid, block, 0, stream>>>(...)` is rewritten to.
inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
    static std::vector<Thread> threads(1024);  // their stacks are used again
    std::mt19937 drawn(0);
    gridDim = grid, blockDim = block, running = &kernel;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) blockIdx = dim3(x, y), run_block(block, threads, drawn);
    }
}

// Hopper's own instructions (sm_90a), one function each: tensor maps and the copies by them, barriers that count bytes,
// and products of warpgroups. Tests put a host's version of this file in its place (tests/kernels/on_host).
//
// Layout of a box in shared memory: kBoxRows rows of 64 16-bit elements, 128 bytes each, from an address divisible by 1024;
// the copy swaps 16-byte pieces within a row, piece p of row r at p ^ (r % 8). Read as an operand whose long side runs along
// the row ("MN-major") this is the canonical 128-byte-swizzled layout of the PTX ISA: 8 rows lie 1024 bytes after the 8 before
// (stride byte offset), the next 64 elements of the row one box further (leading byte offset).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "box.hpp"
#include "check.cuh"
#include "dtype.hpp"

namespace hvpfast {

using TensorMap = CUtensorMap;

// Describes x (rows, width), unit stride along the width, 16-bit elements, for copies of boxes of (kBoxRows, 64): zeros past
// the ends. x on 16 bytes, stride (elements) divisible by 8; rows, width > 0.
inline TensorMap tensor_map(const void* x, Dtype dtype, int64_t rows, int64_t width, int64_t stride) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult state = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &state),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &state), "cudaGetDriverEntryPoint");
#endif
    if (found == nullptr || state != cudaDriverEntryPointSuccess) {
        throw std::runtime_error("the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12 or later");
    }
    const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    TensorMap map;
    const auto type = dtype == Dtype::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t extents[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
    const cuuint32_t box[] = {kBoxWidth, kBoxRows}, steps[] = {1, 1};
    const CUresult code = encode(&map, type, 2, const_cast<void*>(x), extents, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (code != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeTiled returned " + std::to_string(static_cast<int>(code)));
    }
    return map;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The launch's shared memory, from an address divisible by 1024; the launch asks for 1023 bytes more.
inline __device__ uint32_t shared_memory() {
    extern __shared__ unsigned char bytes[];
    return (static_cast<uint32_t>(__cvta_generic_to_shared(bytes)) + 1023u) & ~1023u;
}

inline __device__ void barrier_make(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After all barriers are made, by the thread that made them: copies may then refer to them.
inline __device__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

inline __device__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and has the phase wait for that many bytes of copies as well.
inline __device__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the barrier's phase of this parity is over; parity 1 is over before the first phase begins.
inline __device__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\nbra again;\nover:\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// One box, from (row, column) of the tensor, to shared memory; the barrier counts its bytes.
inline __device__ void copy_box(const TensorMap* map, int32_t row, int32_t column, uint32_t to, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

inline __device__ void map_ahead(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Between other uses of a product's registers and its next.
inline __device__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
inline __device__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most this many groups of products are under way.
template <int COUNT>
__device__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
}

// A sum's registers belong to the products under way until these are waited for: no arithmetic on them may move ahead of the
// wait, of which the compiler knows nothing.
inline __device__ void products_done(float (&d)[64]) {
#pragma unroll
    for (int e = 0; e < 64; ++e) asm volatile("" : "+f"(d[e])::"memory");
}

// The type of the operands is a part of the instruction's name: a literal, in the one place that differs.
#define HVPFAST_WGMMA(TYPE) \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63" \
        "}, %64, %65, p, 1, 1, 1, 1;\n}\n" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) \
        : "l"(a), "l"(b), "r"(accumulate))

// d (64, 128) (+)= a' b over 16 rows of 64 and of 128 elements; a, b: descriptors (box.hpp). Thread t of the warpgroup
// holds d[product_row(t, e)][product_column(t, e)] in d[e].
template <Dtype DTYPE>
__device__ void product(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    if constexpr (DTYPE == Dtype::bfloat16) {
        HVPFAST_WGMMA("bf16");
    } else {
        HVPFAST_WGMMA("f16");
    }
}

#undef HVPFAST_WGMMA

#endif

}  // namespace hvpfast

// The tiles of gram on Hopper: x (N, D) 16-bit, or float32 split into bf16 halves first, by products of warpgroups (wgmma).
//
// A block owns one 128 x 128 tile of the lower triangle and one range of rows. One warp has boxes of 64 rows copied into a
// ring of stages (TMA); two warpgroups multiply, each its 64 rows of the tile with all 128 columns. Both operands are read as
// they lie in x, rows along the sum (MN-major), which wgmma can for 16-bit data only: hence the halves. Three products of halves
// go small ones first. Tensor cores add with truncation, so a sum of theirs runs over kChunk stages only, and is then added
// to a total that is rounded correctly. Partial tiles go to the workspace of gram.cu, whose add_kernel adds them in order.
//
// Not yet run on a GPU: compiled with its resources checked, and its source run on a host whose tensor cores are a program
// (tests/kernels). Triton's kernel is taken before it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.cuh"
#include "gram.hpp"
#include "hopper.cuh"
#include "triangle.cuh"

namespace hvpfast {
namespace {

constexpr int kTile = 128;                      // side of a tile: two boxes, and the height of two warpgroups
constexpr int kConsumers = 256;                 // threads that multiply; one warp more copies
constexpr int kThreads = kConsumers + 32;
constexpr int kChunk = 16;                      // stages that the tensor cores add by themselves: 1024 rows
constexpr int kSide = 2 * kBoxBytes;            // bytes of 64 rows of a tile's side, 128 elements wide
static_assert(kTile == 2 * kBoxWidth && kChunk * kBoxRows == 1024);

// PRODUCTS 1: x as it is. 3: halves, x = high + low; high'low + low'high + high'high.
template <int PRODUCTS>
struct Plan {
    static constexpr int halves = PRODUCTS == 3 ? 2 : 1;
    static constexpr int stage = halves * 2 * kSide;  // bytes: left and right, of each half
    static constexpr int stages = 6 / halves;
    static constexpr int bytes = stages * stage + 2 * stages * 8 + 1023;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The 64 rows of a stage, multiplied by one warpgroup into its sum. left, right: addresses of the first half's boxes; the
// second half's lie `apart` bytes further.
template <Dtype DTYPE, int PRODUCTS>
__device__ void multiply(float (&sum)[64], uint32_t left, uint32_t right, uint32_t apart, bool fresh) {
#pragma unroll
    for (int p = 0; p < PRODUCTS; ++p) {  // of halves: high low, low high, high high
        const uint32_t a = left + (PRODUCTS == 3 && p == 1 ? apart : 0), b = right + (PRODUCTS == 3 && p == 0 ? apart : 0);
#pragma unroll
        for (int k = 0; k < kBoxRows / kProductRows; ++k) {
            product<DTYPE>(sum, descriptor(a + k * kBytesPerProduct), descriptor(b + k * kBytesPerProduct),
                           !(fresh && p == 0 && k == 0));
        }
    }
}

#endif

// Block (tile, split). workspace: (splits, triangle, kTile, kTile). rows_per_split: a multiple of kBoxRows.
template <Dtype DTYPE, int PRODUCTS>
__global__ void __launch_bounds__(kThreads, 1)
    tile_kernel(const __grid_constant__ TensorMap high, const __grid_constant__ TensorMap low, int64_t rows,
                int64_t rows_per_split, float* workspace) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using Ring = Plan<PRODUCTS>;
    const uint32_t stages = shared_memory(), full = stages + Ring::stages * Ring::stage, empty = full + Ring::stages * 8;
    const Place at = triangle(blockIdx.x);
    const bool diagonal = at.row == at.column;  // left and right are the same boxes
    const int64_t first = blockIdx.y * rows_per_split, last = min(first + rows_per_split, rows);
    const int steps = first < last ? static_cast<int>((last - first + kBoxRows - 1) / kBoxRows) : 0;
    if (threadIdx.x == 0) {
        for (int s = 0; s < Ring::stages; ++s) barrier_make(full + 8 * s, 1), barrier_make(empty + 8 * s, kConsumers / 32);
        barriers_made();
    }
    __syncthreads();
    if (threadIdx.x >= kConsumers) {
        if (threadIdx.x != kConsumers) return;
        map_ahead(&high);
        if (PRODUCTS == 3) map_ahead(&low);
        for (int i = 0; i < steps; ++i) {
            const int s = i % Ring::stages;
            const uint32_t stage = stages + s * Ring::stage;
            const int row = static_cast<int>(first) + i * kBoxRows;
            barrier_wait(empty + 8 * s, (i / Ring::stages & 1) ^ 1);
            barrier_expect(full + 8 * s, diagonal ? Ring::stage / 2 : Ring::stage);
            for (int half = 0; half < Ring::halves; ++half) {
                for (int box = 0; box < (diagonal ? 2 : 4); ++box) {
                    const int column = (box < 2 ? at.row : at.column) * kTile + box % 2 * kBoxWidth;
                    copy_box(half == 0 ? &high : &low, row, column, stage + half * 2 * kSide + box * kBoxBytes, full + 8 * s);
                }
            }
        }
        return;
    }
    const int group = threadIdx.x / 128, lane = threadIdx.x % 128;
    float total[64] = {}, sum[64] = {};
    for (int chunk = 0; chunk < steps; chunk += kChunk) {
        const int end = min(chunk + kChunk, steps);
        for (int i = chunk; i < end; ++i) {
            const int s = i % Ring::stages;
            const uint32_t left = stages + s * Ring::stage, right = left + (diagonal ? 0 : kSide);
            barrier_wait(full + 8 * s, i / Ring::stages & 1);
            products_begin();
            multiply<DTYPE, PRODUCTS>(sum, left + group * kBoxBytes, right, 2 * kSide, i == chunk);
            products_end();
            if (i > chunk) {
                products_wait<1>();  // those of the stage before
                if (lane % 32 == 0) barrier_arrive(empty + 8 * ((i - 1) % Ring::stages));
            }
        }
        products_wait<0>();
        products_done(sum);
        if (lane % 32 == 0) barrier_arrive(empty + 8 * ((end - 1) % Ring::stages));
#pragma unroll
        for (int e = 0; e < 64; ++e) total[e] += sum[e];
    }
    float* part = workspace + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kTile * kTile;
#pragma unroll
    for (int e = 0; e < 64; e += 2) {
        float* to = part + (group * 64 + product_row(lane, e)) * kTile + product_column(lane, e);
        *reinterpret_cast<float2*>(to) = make_float2(total[e], total[e + 1]);
    }
#endif
}

// x (rows, width) -> high + low (rows, pitch) in bf16, zeros beyond the width; low is left out where it is null.
__global__ void __launch_bounds__(256)
    split_kernel(const float* x, int64_t rows, int64_t width, int64_t stride_n, int64_t stride_d, int64_t pitch,
                 __nv_bfloat16* high, __nv_bfloat16* low) {
    const int64_t hop = static_cast<int64_t>(gridDim.x) * 256;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < rows * pitch; i += hop) {
        const int64_t n = i / pitch, d = i % pitch;
        const float value = d < width ? x[n * stride_n + d * stride_d] : 0.0f;
        const __nv_bfloat16 rounded = __float2bfloat16(value);
        high[i] = rounded;
        if (low != nullptr) low[i] = __float2bfloat16(value - __bfloat162float(rounded));
    }
}

template <Dtype DTYPE, int PRODUCTS>
void tiles(const GramArguments& a, const TensorMap& high, const TensorMap& low, int blocks, int64_t per_split,
           cudaStream_t stream) {
    const auto kernel = tile_kernel<DTYPE, PRODUCTS>;
    constexpr int bytes = Plan<PRODUCTS>::bytes;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
    const dim3 grid(blocks * (blocks + 1) / 2, a.splits);
    kernel<<<grid, kThreads, bytes, stream>>>(high, low, a.rows, per_split, a.workspace);
    check(cudaGetLastError(), "gram: the launch of the tiles");
}

}  // namespace

int64_t gram_halves(int64_t rows, int64_t width, int products) {
    return rows * ((width + 7) / 8 * 8) * (products == 3 ? 2 : 1);
}

void gram_tiles_sm90(const GramArguments& a, int blocks, int64_t per_split) {
    const auto stream = reinterpret_cast<cudaStream_t>(a.stream);
    if (a.dtype != Dtype::float32) {
        const TensorMap map = tensor_map(a.x, a.dtype, a.rows, a.width, a.stride_n);
        if (a.dtype == Dtype::bfloat16) return tiles<Dtype::bfloat16, 1>(a, map, map, blocks, per_split, stream);
        return tiles<Dtype::float16, 1>(a, map, map, blocks, per_split, stream);
    }
    const int64_t pitch = (a.width + 7) / 8 * 8;
    auto* high = static_cast<__nv_bfloat16*>(a.halves);
    __nv_bfloat16* low = a.products == 3 ? high + a.rows * pitch : nullptr;
    const auto split_blocks = static_cast<unsigned>(min((a.rows * pitch + 1023) / 1024, static_cast<int64_t>(4096)));
    split_kernel<<<split_blocks, 256, 0, stream>>>(static_cast<const float*>(a.x), a.rows, a.width, a.stride_n, a.stride_d,
                                                   pitch, high, low);
    check(cudaGetLastError(), "gram: the launch of the split in halves");
    const TensorMap map = tensor_map(high, Dtype::bfloat16, a.rows, a.width, pitch);
    if (low == nullptr) return tiles<Dtype::bfloat16, 1>(a, map, map, blocks, per_split, stream);
    const TensorMap rest = tensor_map(low, Dtype::bfloat16, a.rows, a.width, pitch);
    tiles<Dtype::bfloat16, 3>(a, map, rest, blocks, per_split, stream);
}

}  // namespace hvpfast

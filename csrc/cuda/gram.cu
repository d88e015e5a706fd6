// out = beta out + alpha (x 1)'(x 1), x (N, D): the lower triangle in tiles of 128 x 128, split over N.
//
// A block of 256 threads owns one tile and one range of rows, and leaves a float32 partial tile in the workspace;
// blocks past the triangle sum columns for the ones column. A second kernel adds the ranges in order, scales, and writes
// both halves from one value. 16-bit data: 16 x 16 x 16 tensor-core products (every GPU since sm_80), each warp 64 x 32.
// float32: fused multiply-adds, each thread 8 x 8. Tensor cores add with truncation, so a sum of theirs runs over kChunk
// steps only, and is then added to a total that is rounded correctly.
// Not yet measured on a GPU. On Hopper the tiles are those of gram_sm90.cu instead, where the launcher says so.
#include <mma.h>

#include "check.cuh"
#include "gram.hpp"
#include "triangle.cuh"
#include "widen.cuh"

namespace hvpfast {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kTile = 128;     // side of a tile of the result
constexpr int kThreads = 256;  // of the first kernel
constexpr int kChunk = 32;     // steps that the tensor cores add by themselves: 1024 rows
constexpr int kSquare = 32;    // side of what one block of the second kernel adds up
constexpr int kSquareRows = 8;

template <typename T>
struct Rows {  // x and the range of rows that a block sums
    const T* x;
    int64_t stride_n, stride_d, width, first, last;
};

// Copies rows [n, n + kRows) x columns [d, d + kTile) into tile (kRows, kPitch), zeros past the ends. VECTORS: 16 bytes at
// a time, which needs unit stride_d, and width, stride_n and x's address divisible by 16 bytes.
template <typename T, int kRows, int kPitch, bool VECTORS>
__device__ void load_tile(const Rows<T>& rows, int64_t n, int64_t d, T* tile) {
    if constexpr (VECTORS) {
        constexpr int kLanes = 16 / static_cast<int>(sizeof(T));
        for (int i = threadIdx.x; i < kRows * kTile / kLanes; i += kThreads) {
            const int r = i / (kTile / kLanes), c = i % (kTile / kLanes) * kLanes;
            uint4 value = make_uint4(0, 0, 0, 0);
            if (n + r < rows.last && d + c < rows.width) {
                value = *reinterpret_cast<const uint4*>(rows.x + (n + r) * rows.stride_n + d + c);
            }
            *reinterpret_cast<uint4*>(tile + r * kPitch + c) = value;
        }
    } else {
        for (int i = threadIdx.x; i < kRows * kTile; i += kThreads) {
            const int r = i / kTile, c = i % kTile;
            const bool inside = n + r < rows.last && d + c < rows.width;
            tile[r * kPitch + c] = inside ? rows.x[(n + r) * rows.stride_n + (d + c) * rows.stride_d] : T(0.0f);
        }
    }
}

// Column sums of columns [d, d + kTile), into sums (kTile,): two threads a column, each every second row.
template <typename T>
__device__ void partial_sums(const Rows<T>& rows, int64_t d, float* sums) {
    __shared__ float halves[2][kTile];
    const int c = threadIdx.x % kTile, half = threadIdx.x / kTile;
    float total = 0.0f;
    for (int64_t chunk = rows.first; chunk < rows.last; chunk += 1024) {
        float part = 0.0f;
        const int64_t end = min(chunk + 1024, rows.last);
        if (d + c < rows.width) {
            for (int64_t n = chunk + half; n < end; n += 2) part += widen(rows.x[n * rows.stride_n + (d + c) * rows.stride_d]);
        }
        total += part;
    }
    halves[half][c] = total;
    __syncthreads();
    if (half == 0) sums[c] = halves[0][c] + halves[1][c];
}

// One tile of x'x for 16-bit data, by tensor cores: warps 2 x 4, each 64 x 32 of the tile.
template <typename T, bool VECTORS>
__device__ void partial_16(const Rows<T>& rows, int64_t i, int64_t j, float* part) {
    constexpr int kRows = 32, kPitch = kTile + 8;  // the pitch spreads the rows over the banks
    __shared__ __align__(128) T left[kRows * kPitch];
    __shared__ __align__(128) T right[kRows * kPitch];
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> total[4][2], sum[4][2];
    const int warp = threadIdx.x / 32, r = warp / 4 * 64, c = warp % 4 * 32;
    for (auto& line : total) for (auto& one : line) wmma::fill_fragment(one, 0.0f);
    for (int64_t chunk = rows.first; chunk < rows.last; chunk += kRows * kChunk) {
        for (auto& line : sum) for (auto& one : line) wmma::fill_fragment(one, 0.0f);
        const int64_t end = min(chunk + kRows * kChunk, rows.last);
        for (int64_t n = chunk; n < end; n += kRows) {
            load_tile<T, kRows, kPitch, VECTORS>(rows, n, i, left);
            load_tile<T, kRows, kPitch, VECTORS>(rows, n, j, right);
            __syncthreads();
#pragma unroll
            for (int k = 0; k < kRows; k += 16) {
                wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::col_major> a[4];  // left' of (rows, columns)
                wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major> b[2];
#pragma unroll
                for (int p = 0; p < 4; ++p) wmma::load_matrix_sync(a[p], left + k * kPitch + r + 16 * p, kPitch);
#pragma unroll
                for (int q = 0; q < 2; ++q) wmma::load_matrix_sync(b[q], right + k * kPitch + c + 16 * q, kPitch);
#pragma unroll
                for (int p = 0; p < 4; ++p)
#pragma unroll
                    for (int q = 0; q < 2; ++q) wmma::mma_sync(sum[p][q], a[p], b[q], sum[p][q]);
            }
            __syncthreads();
        }
#pragma unroll
        for (int p = 0; p < 4; ++p)
#pragma unroll
            for (int q = 0; q < 2; ++q)
#pragma unroll
                for (int e = 0; e < sum[p][q].num_elements; ++e) total[p][q].x[e] += sum[p][q].x[e];
    }
#pragma unroll
    for (int p = 0; p < 4; ++p)
#pragma unroll
        for (int q = 0; q < 2; ++q)
            wmma::store_matrix_sync(part + (r + 16 * p) * kTile + c + 16 * q, total[p][q], kTile, wmma::mem_row_major);
}

// One tile of x'x for float32 data: threads 16 x 16, each 8 x 8 of the tile, as 2 x 2 groups of 4 x 4 that lie 64 apart.
template <bool VECTORS>
__device__ void partial_32(const Rows<float>& rows, int64_t i, int64_t j, float* part) {
    constexpr int kRows = 16;
    __shared__ __align__(16) float left[kRows * kTile];
    __shared__ __align__(16) float right[kRows * kTile];
    const int r = threadIdx.x / 16 * 4, c = threadIdx.x % 16 * 4;
    float total[8][8] = {};
    for (int64_t n = rows.first; n < rows.last; n += kRows) {
        load_tile<float, kRows, kTile, VECTORS>(rows, n, i, left);
        load_tile<float, kRows, kTile, VECTORS>(rows, n, j, right);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            float a[8], b[8];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 from_a = *reinterpret_cast<const float4*>(left + k * kTile + r + 64 * half);
                const float4 from_b = *reinterpret_cast<const float4*>(right + k * kTile + c + 64 * half);
                a[4 * half] = from_a.x, a[4 * half + 1] = from_a.y, a[4 * half + 2] = from_a.z, a[4 * half + 3] = from_a.w;
                b[4 * half] = from_b.x, b[4 * half + 1] = from_b.y, b[4 * half + 2] = from_b.z, b[4 * half + 3] = from_b.w;
            }
#pragma unroll
            for (int p = 0; p < 8; ++p)
#pragma unroll
                for (int q = 0; q < 8; ++q) total[p][q] = fmaf(a[p], b[q], total[p][q]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int p = 0; p < 8; ++p)
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            part[(r + p % 4 + 64 * (p / 4)) * kTile + c + q % 4 + 64 * (q / 4)] = total[p][q];
        }
}

// Block (tile - first_tile, split): a tile of the triangle, or past it a block of column sums.
// workspace: (splits, triangle, kTile, kTile), then (splits, blocks, kTile).
template <typename T, bool VECTORS>
__global__ void __launch_bounds__(kThreads)
    partial_kernel(const T* x, int64_t rows, int64_t width, int64_t stride_n, int64_t stride_d, int64_t rows_per_split,
                   int blocks, int first_tile, float* workspace) {
    const int in_triangle = blocks * (blocks + 1) / 2, tile = first_tile + blockIdx.x, split = blockIdx.y;
    const int64_t first = split * rows_per_split;
    const Rows<T> range{x, stride_n, stride_d, width, first, min(first + rows_per_split, rows)};
    if (tile >= in_triangle) {
        float* sums = workspace + static_cast<int64_t>(gridDim.y) * in_triangle * kTile * kTile;
        const int block = tile - in_triangle;
        partial_sums(range, static_cast<int64_t>(block) * kTile, sums + (static_cast<int64_t>(split) * blocks + block) * kTile);
        return;
    }
    const Place at = triangle(tile);
    const int64_t i = static_cast<int64_t>(at.row) * kTile, j = static_cast<int64_t>(at.column) * kTile;
    float* part = workspace + (static_cast<int64_t>(split) * in_triangle + tile) * kTile * kTile;
    if constexpr (sizeof(T) == 2) {
        partial_16<T, VECTORS>(range, i, j, part);
    } else {
        partial_32<VECTORS>(range, i, j, part);
    }
}

__device__ void blend(float* place, float value, float alpha, float beta) {
    *place = beta == 0.0f ? alpha * value : beta * *place + alpha * value;
}

// Adds the splits of a kSquare x kSquare part of a tile (or, past the triangle, of a block of column sums) and writes it below
// the diagonal and, with `mirror`, above, that half through shared memory so that both are written along rows.
__global__ void __launch_bounds__(kSquare* kSquareRows, 4)
    add_kernel(const float* workspace, int splits, int blocks, int64_t rows, int64_t width, float* out, int64_t stride_i,
               int64_t stride_j, float alpha, float beta, bool mirror) {
    __shared__ float square[kSquare][kSquare + 1];
    constexpr int kPerSide = kTile / kSquare, kPerTile = kPerSide * kPerSide;
    const int in_triangle = blocks * (blocks + 1) / 2, lane = threadIdx.x, line = threadIdx.y;
    const int64_t split_step = static_cast<int64_t>(in_triangle) * kTile * kTile;
    if (blockIdx.x >= static_cast<unsigned>(in_triangle * kPerTile)) {
        const int block = blockIdx.x - in_triangle * kPerTile;
        const float* sums = workspace + splits * split_step + static_cast<int64_t>(block) * kTile;
        for (int c = line * kSquare + lane; c < kTile; c += kSquare * kSquareRows) {
            const int64_t d = static_cast<int64_t>(block) * kTile + c;
            float total = 0.0f;
            for (int s = 0; s < splits; ++s) total += sums[static_cast<int64_t>(s) * blocks * kTile + c];
            if (d < width) blend(out + width * stride_i + d * stride_j, total, alpha, beta);
            if (mirror && d < width) blend(out + d * stride_i + width * stride_j, total, alpha, beta);
        }
        if (block == 0 && lane == 0 && line == 0) {
            blend(out + width * (stride_i + stride_j), static_cast<float>(rows), alpha, beta);
        }
        return;
    }
    const int tile = blockIdx.x / kPerTile, part = blockIdx.x % kPerTile;
    const Place at = triangle(tile);
    const int r = part / kPerSide * kSquare, c = part % kPerSide * kSquare;  // within the tile
    const int64_t i = static_cast<int64_t>(at.row) * kTile + r, j = static_cast<int64_t>(at.column) * kTile + c;
    if (i + kSquare <= j) return;  // above the diagonal altogether
    const float* from = workspace + static_cast<int64_t>(tile) * kTile * kTile;
    for (int y = line; y < kSquare; y += kSquareRows) {
        float total = 0.0f;
        for (int s = 0; s < splits; ++s) total += from[s * split_step + (r + y) * kTile + c + lane];
        square[y][lane] = total;
        const int64_t row = i + y, column = j + lane;
        if (row < width && column <= row) blend(out + row * stride_i + column * stride_j, total, alpha, beta);
    }
    if (!mirror) return;
    __syncthreads();
    for (int y = line; y < kSquare; y += kSquareRows) {
        const int64_t row = i + lane, column = j + y;  // of the value; it goes to (column, row)
        if (row < width && column < row) blend(out + column * stride_i + row * stride_j, square[lane][y], alpha, beta);
    }
}

int blocks_of(int64_t width) { return width > kTile ? static_cast<int>((width + kTile - 1) / kTile) : 1; }

template <typename T>
void partials(const GramArguments& a, int blocks, int64_t per_split, cudaStream_t stream) {
    const int64_t lanes = 16 / static_cast<int64_t>(sizeof(T));
    const bool vectors = a.stride_d == 1 && a.stride_n % lanes == 0 && a.width % lanes == 0 &&
                         reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
    const int in_triangle = blocks * (blocks + 1) / 2, first_tile = a.products > 0 ? in_triangle : 0;
    const dim3 grid(in_triangle - first_tile + (a.ones_column ? blocks : 0), a.splits);
    if (grid.x == 0) return;  // the tiles are made elsewhere, and nothing else is asked for
    const auto kernel = vectors ? partial_kernel<T, true> : partial_kernel<T, false>;
    kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(a.x), a.rows, a.width, a.stride_n, a.stride_d, per_split,
                                          blocks, first_tile, a.workspace);
    check(cudaGetLastError(), "gram: the launch of the partial sums");
}

}  // namespace

int gram_tile() { return kTile; }

int64_t gram_workspace(int64_t width, bool ones_column, int splits) {
    const int64_t blocks = blocks_of(width);
    return splits * (blocks * (blocks + 1) / 2 * kTile * kTile + (ones_column ? blocks * kTile : 0));
}

void gram(const GramArguments& a) {
    const OnDevice guard(a.device);
    const auto stream = reinterpret_cast<cudaStream_t>(a.stream);
    const int blocks = blocks_of(a.width);
    const int64_t step = 64;  // rows of a split come in whole steps of every kernel
    const int64_t per_split = (a.rows + step * a.splits - 1) / (step * a.splits) * step;
    if (a.products > 0) gram_tiles_sm90(a, blocks, per_split);
    with_type<float, __nv_bfloat16, __half>(
        a.dtype, "gram", [&](auto of) { partials<typename decltype(of)::type>(a, blocks, per_split, stream); });
    constexpr int kPerTile = (kTile / kSquare) * (kTile / kSquare);
    const dim3 grid(blocks * (blocks + 1) / 2 * kPerTile + (a.ones_column ? blocks : 0));
    add_kernel<<<grid, dim3(kSquare, kSquareRows), 0, stream>>>(a.workspace, a.splits, blocks, a.rows, a.width, a.out,
                                                                a.out_stride_i, a.out_stride_j, a.alpha, a.beta, a.mirror);
    check(cudaGetLastError(), "gram: the launch of the reduction");
}

}  // namespace hvpfast

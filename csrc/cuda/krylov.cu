// w minus its part in k orthonormal rows, twice (classical Gram-Schmidt), with coefficients and norm: V (k, n) is read three
// times instead of four, w and the intermediate vectors once each, and no number leaves the device.
//
//   dots         c1 = V w                                   V read
//   step, dots   w1 = w - V'c1,  c2 = V w1                  V read: a chunk of 256 columns again from the L2 cache
//   step, norm   w2 = w1 - V'c2, |w2|^2                     V read
//   scale        w2 / |w2|, if asked for
//
// A vector may be a list of tensors as they lie (a model's parameters): a launch takes kPieces of them, and deals their chunks
// to its blocks in turn. Blocks sum chunks of columns in their order and leave float64 partial sums; `add_kernel` adds the blocks in theirs: the same
// bits every time. All sums are float64 for every dtype: at two multiplications an element a GPU with half-rate float64 still
// waits for memory. Not yet measured on a GPU.
#include "check.cuh"
#include "krylov.hpp"
#include "widen.cuh"

namespace hvpfast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChunk = 256;                        // columns a block takes at a time: 1 KB of a float32 row
constexpr int kQuads = kChunk / 4;                 // threads side by side in a step, four columns each ...
constexpr int kGroups = kThreads / kQuads;         // ... and groups of them, which share the rows
constexpr int kTogether = 4;                       // rows whose loads are under way at once
constexpr int kAddColumns = 32, kAddRows = 8;      // shape of a block of add_kernel

template <typename T>
struct Wide {
    using type = float;
};
template <>
struct Wide<double> {
    using type = double;
};

constexpr int kPieces = 40;  // tensors of a launch: their places travel with its arguments (4 KB at the most)

template <typename T>
struct Rows {
    const T* at;
    int64_t count, length, stride_k, stride_n;
};

template <typename T, typename In, typename Out>
struct Piece {
    Rows<T> rows;
    const In* w;
    int64_t stride_w;
    Out* rest;
    int turn;  // the block that takes its first chunk
};

template <typename T, typename In, typename Out>
struct Pieces {
    Piece<T, In, Out> of[kPieces];
    int64_t count;  // of rows
    int pieces;
};

template <typename T>
struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) Four {
    T of[4];
};

// Columns first .. first + 3 of row k, zeros past the end. VECTORS: unit stride_n, and rows that begin on 16 bytes.
template <bool VECTORS, typename T>
__device__ void load(const Rows<T>& rows, int64_t k, int64_t first, double (&to)[4]) {
    const T* from = rows.at + k * rows.stride_k + first * rows.stride_n;
    if (VECTORS && first + 4 <= rows.length) {
        const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
        for (int e = 0; e < 4; ++e) to[e] = static_cast<double>(widen(four.of[e]));
        return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        to[e] = first + e < rows.length ? static_cast<double>(widen(from[e * rows.stride_n])) : 0.0;
    }
}

// The sum over a warp, in lane 0.
__device__ double over_warp(double x) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_down_sync(0xffffffffu, x, apart);
    return x;
}

// held (kChunk,) = w - V'c for the columns from `first` on, and into `rest`; zeros past the end.
template <bool VECTORS, typename T, typename In, typename Out>
__device__ void step(const Rows<T>& rows, const In* w, int64_t stride_w, const double* c, int64_t first, Out* rest,
                     double* held) {
    __shared__ double parts[kGroups][kChunk];
    const int quad = threadIdx.x % kQuads, group = threadIdx.x / kQuads;
    double sum[4] = {};
#pragma unroll kTogether
    for (int64_t k = group; k < rows.count; k += kGroups) {
        double row[4];
        load<VECTORS>(rows, k, first + 4 * quad, row);
        const double factor = c[k];
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] = fma(factor, row[e], sum[e]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) parts[group][4 * quad + e] = sum[e];
    __syncthreads();
    const int own = threadIdx.x;
    double value = 0.0;
    if (first + own < rows.length) {
        double part = 0.0;
        for (int g = 0; g < kGroups; ++g) part += parts[g][own];
        const Out rounded = static_cast<Out>(static_cast<double>(widen(w[(first + own) * stride_w])) - part);
        rest[first + own] = rounded;
        value = static_cast<double>(rounded);
    }
    held[own] = value;
    __syncthreads();
}

// dots (k,) (+)= V held over the columns from `first` on: a warp takes every kWarps-th row, so each dot has one owner.
template <bool VECTORS, typename T>
__device__ void dot(const Rows<T>& rows, const double* held, int64_t first, bool fresh, double* dots) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int64_t k = warp; k < rows.count; k += kTogether * kWarps) {
        double sum[kTogether] = {};
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
            if (k + r * kWarps < rows.count) {
#pragma unroll
                for (int c = 4 * lane; c < kChunk; c += 128) {
                    double row[4];
                    load<VECTORS>(rows, k + r * kWarps, first + c, row);
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[r] = fma(row[e], held[c + e], sum[r]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kTogether; ++r) {
            sum[r] = over_warp(sum[r]);
            if (lane == 0 && k + r * kWarps < rows.count) {
                double* place = dots + k + r * kWarps;
                *place = fresh ? sum[r] : *place + sum[r];
            }
        }
    }
}

enum class Pass { dots, step_dots, step_norm };

// The first column that a block takes of a piece: chunk c goes to block (turn + c) modulo the blocks.
__device__ int64_t first_column(int turn) {
    const int blocks = static_cast<int>(gridDim.x), own = static_cast<int>(blockIdx.x);
    return static_cast<int64_t>((own - turn + blocks) % blocks) * kChunk;
}

// One pass over V. parts: (blocks, k) dot products, or (blocks,) squared norms of the rest.
template <Pass PASS, bool VECTORS, typename T, typename In, typename Out>
__global__ void __launch_bounds__(kThreads, 2)
    pass_kernel(const __grid_constant__ Pieces<T, In, Out> all, const double* c, double* parts) {
    __shared__ double held[kChunk];
    __shared__ double of_warps[kWarps];
    double squares = 0.0;
    bool fresh = true;
    const int64_t hop = static_cast<int64_t>(gridDim.x) * kChunk;
    for (int i = 0; i < all.pieces; ++i) {
        const Piece<T, In, Out>& piece = all.of[i];
        const Rows<T>& rows = piece.rows;
        for (int64_t first = first_column(piece.turn); first < rows.length; first += hop) {
            if constexpr (PASS == Pass::dots) {
                const int64_t own = first + threadIdx.x;
                held[threadIdx.x] = own < rows.length ? static_cast<double>(widen(piece.w[own * piece.stride_w])) : 0.0;
                __syncthreads();
            } else {
                step<VECTORS>(rows, piece.w, piece.stride_w, c, first, piece.rest, held);
            }
            if constexpr (PASS == Pass::step_norm) {
                squares = fma(held[threadIdx.x], held[threadIdx.x], squares);
            } else {
                dot<VECTORS>(rows, held, first, fresh, parts + blockIdx.x * all.count);
                fresh = false;
                __syncthreads();  // before `held` is written again
            }
        }
    }
    if constexpr (PASS != Pass::step_norm) {
        if (!fresh) return;  // else there was nothing for this block
        for (int64_t k = threadIdx.x; k < all.count; k += kThreads) parts[blockIdx.x * all.count + k] = 0.0;
    }
    if constexpr (PASS == Pass::step_norm) {
        squares = over_warp(squares);
        if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = squares;
        __syncthreads();
        if (threadIdx.x == 0) {
            double total = 0.0;
            for (int i = 0; i < kWarps; ++i) total += of_warps[i];
            parts[blockIdx.x] = total;
        }
    }
}

// sums (columns,) = the rows of parts (blocks, columns) in order; totals = before + sums where asked for; `root`: its root.
__global__ void __launch_bounds__(kAddColumns* kAddRows)
    add_kernel(const double* parts, int blocks, int64_t columns, bool root, double* sums, const double* before,
               double* totals) {
    __shared__ double lines[kAddRows][kAddColumns];
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kAddColumns + threadIdx.x;
    double sum = 0.0;
    if (column < columns) {
#pragma unroll 8
        for (int b = threadIdx.y; b < blocks; b += kAddRows) sum += parts[b * columns + column];
    }
    lines[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= columns) return;
    for (int y = 1; y < kAddRows; ++y) sum += lines[y][threadIdx.x];
    sums[column] = root ? sqrt(sum) : sum;
    if (totals != nullptr) totals[column] = before[column] + sum;
}

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ Pieces<T, Out, Out> all, const double* norm) {
    static_assert(kThreads == kChunk);
    const double divisor = *norm > 0.0 || *norm != *norm ? *norm : 1.0;  // a NaN stays one
    const int64_t hop = static_cast<int64_t>(gridDim.x) * kChunk;
    for (int p = 0; p < all.pieces; ++p) {
        Out* x = all.of[p].rest;
        for (int64_t i = first_column(all.of[p].turn) + threadIdx.x; i < all.of[p].rows.length; i += hop) {
            x[i] = static_cast<Out>(static_cast<double>(x[i]) / divisor);
        }
    }
}

// The group-th kPieces pieces. `again`: what is read is what the first step wrote.
template <typename T, typename In, typename Out>
Pieces<T, In, Out> pieces_of(const ReorthogonalizeArguments& a, int group, bool again) {
    Pieces<T, In, Out> made{};
    made.count = a.count;
    int64_t chunks = 0;
    for (int i = group * kPieces; i < a.pieces && made.pieces < kPieces; ++i) {
        const int64_t* at = a.places + 7 * static_cast<int64_t>(i);
        Piece<T, In, Out>& piece = made.of[made.pieces++];
        piece.rest = reinterpret_cast<Out*>(at[5]);
        piece.rows = {reinterpret_cast<const T*>(at[2]), a.count, at[6], at[3], at[4]};
        piece.w = reinterpret_cast<const In*>(again ? at[5] : at[0]);
        piece.stride_w = again ? 1 : at[1];
        piece.turn = static_cast<int>(chunks % a.blocks);
        chunks += (at[6] + kChunk - 1) / kChunk;
    }
    return made;
}

int groups_of(int pieces) { return pieces > kPieces ? (pieces + kPieces - 1) / kPieces : 1; }

template <bool VECTORS, typename T>
void run(const ReorthogonalizeArguments& a, cudaStream_t stream) {
    using Out = typename Wide<T>::type;
    const int groups = groups_of(a.pieces), all = groups * a.blocks;
    const int64_t part = a.blocks * a.count;
    double *parts = a.workspace, *first = parts + all * (a.count > 0 ? a.count : 1), *second = first + a.count;
    const dim3 lines(kAddColumns, kAddRows);
    const double* none = nullptr;
    double* nowhere = nullptr;
    const auto add_blocks = static_cast<unsigned>((a.count + kAddColumns - 1) / kAddColumns);
    if (a.count > 0) {
        const auto dots = pass_kernel<Pass::dots, VECTORS, T, T, Out>;
        const auto both = pass_kernel<Pass::step_dots, VECTORS, T, T, Out>;
        const auto last = pass_kernel<Pass::step_norm, VECTORS, T, Out, Out>;
        for (int g = 0; g < groups; ++g) {
            const auto some = pieces_of<T, T, Out>(a, g, false);
            double* to = parts + g * part;
            dots<<<a.blocks, kThreads, 0, stream>>>(some, none, to);
            check(cudaGetLastError(), "reorthogonalize: the launch of the first products");
        }
        add_kernel<<<add_blocks, lines, 0, stream>>>(parts, all, a.count, false, first, none, nowhere);
        check(cudaGetLastError(), "reorthogonalize: the launch of their sums");
        for (int g = 0; g < groups; ++g) {
            const auto some = pieces_of<T, T, Out>(a, g, false);
            double* to = parts + g * part;
            both<<<a.blocks, kThreads, 0, stream>>>(some, first, to);
            check(cudaGetLastError(), "reorthogonalize: the launch of the first step");
        }
        add_kernel<<<add_blocks, lines, 0, stream>>>(parts, all, a.count, false, second, first, a.coefficients);
        check(cudaGetLastError(), "reorthogonalize: the launch of its sums");
        for (int g = 0; g < groups; ++g) {
            const auto some = pieces_of<T, Out, Out>(a, g, true);
            double* to = parts + g * a.blocks;
            last<<<a.blocks, kThreads, 0, stream>>>(some, second, to);
            check(cudaGetLastError(), "reorthogonalize: the launch of the second step");
        }
    } else {
        const auto last = pass_kernel<Pass::step_norm, VECTORS, T, T, Out>;
        for (int g = 0; g < groups; ++g) {
            const auto some = pieces_of<T, T, Out>(a, g, false);
            double* to = parts + g * a.blocks;
            last<<<a.blocks, kThreads, 0, stream>>>(some, none, to);
            check(cudaGetLastError(), "reorthogonalize: the launch of the norm");
        }
    }
    add_kernel<<<1, lines, 0, stream>>>(parts, all, 1, true, a.norm, none, nowhere);
    check(cudaGetLastError(), "reorthogonalize: the launch of the norm's sum");
    if (a.normalize) {
        const auto scale = scale_kernel<T, Out>;
        for (int g = 0; g < groups; ++g) {
            const auto some = pieces_of<T, Out, Out>(a, g, true);
            scale<<<a.blocks, kThreads, 0, stream>>>(some, a.norm);
            check(cudaGetLastError(), "reorthogonalize: the launch of the division");
        }
    }
}

template <typename T>
void choose(const ReorthogonalizeArguments& a, cudaStream_t stream) {
    bool whole = true;  // rows that begin on 16 bytes
    for (int i = 0; i < a.pieces; ++i) {
        const int64_t* at = a.places + 7 * static_cast<int64_t>(i);
        whole = whole && at[4] == 1 && at[3] * static_cast<int64_t>(sizeof(T)) % 16 == 0 && at[2] % 16 == 0;
    }
    if (whole) {
        run<true, T>(a, stream);
    } else {
        run<false, T>(a, stream);
    }
}

}  // namespace

int krylov_chunk() { return kChunk; }

int64_t reorthogonalize_workspace(int pieces, int64_t count, int blocks) {
    return static_cast<int64_t>(groups_of(pieces)) * blocks * (count > 0 ? count : 1) + 2 * count;
}

void reorthogonalize(const ReorthogonalizeArguments& a) {
    const OnDevice guard(a.device);
    const auto stream = reinterpret_cast<cudaStream_t>(a.stream);
    with_type<float, double, __nv_bfloat16, __half>(
        a.dtype, "reorthogonalize", [&](auto of) { choose<typename decltype(of)::type>(a, stream); });
}

}  // namespace hvpfast

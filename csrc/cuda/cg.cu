// Conjugate gradients between two products, on lists of tensors as they lie, all columns together:
//
//   curvature   c = p'(q + damping p)                                     p, q read
//   step        x += (rz / c) p, r -= (rz / c) (q + damping p), rr = r'r   x, r, p, q read, x, r written
//   direction   p = r + (rr / rz) p                                       r, p read, p written
//
// A column whose c is not positive keeps its x and r. No number leaves the device. Blocks leave float64 partial sums, which
// every block of the next launch adds in one order: the same bits every time, and no launches between. A thread stays
// in one column: the threads that work are a multiple of the columns. Not yet measured on a GPU.
#include "cg.hpp"

#include "check.cuh"
#include "widen.cuh"

namespace hvpfast {
namespace {

constexpr int kThreads = 256;
constexpr int kTogether = 4;    // elements of a thread whose loads are under way at once
constexpr int kTensors = 48;    // of a launch: their places travel with its arguments (4 KB at the most)

template <typename T>
struct Wide {
    using type = float;
};
template <>
struct Wide<double> {
    using type = double;
};

template <typename In, typename Out>
struct Vectors {
    const In *x, *r, *p, *q;
    Out *new_x, *new_r, *new_p;
    int64_t size;
};

template <typename In, typename Out>
struct Group {
    Vectors<In, Out> of[kTensors];
    int count;
};

struct Scalars {
    const double* rz;
    double damping;
    double *curvature, *rr;
    const double* of_curvature;  // partial sums (count, columns)
    const double* of_rr;
    int count, columns;
};

// The sum over a column's threads, on every thread below `columns`: lines[t] of thread t, `working` of them.
__device__ void over_columns(double* lines, int working, int columns) {
    for (int groups = working / columns; groups > 1; groups = (groups + 1) / 2) {
        __syncthreads();
        const int other = static_cast<int>(threadIdx.x) + (groups + 1) / 2 * columns;
        if (static_cast<int>(threadIdx.x) < groups / 2 * columns) lines[threadIdx.x] += lines[other];
    }
    __syncthreads();
}

// The sums of the partial sums, lines[k] of column k: in one order, whichever block asks.
__device__ void totals(const double* parts, int count, int columns, int working, double* lines) {
    double sum = 0.0;
    const int t = threadIdx.x;
    if (t < working) {
        for (int i = t / columns; i < count; i += working / columns) sum += parts[static_cast<int64_t>(i) * columns + t % columns];
    }
    lines[t] = sum;
    over_columns(lines, working, columns);
}

enum class Stage { curvature, step, direction };

// parts: (blocks, columns) of this launch.
template <Stage STAGE, typename In, typename Out>
__global__ void __launch_bounds__(kThreads, 4) cg_kernel(const __grid_constant__ Group<In, Out> group, Scalars s, double* parts) {
    __shared__ double lines[kThreads];
    const int columns = s.columns, working = kThreads / columns * columns, t = threadIdx.x, column = t % columns;
    double rate = 0.0, ratio = 0.0;
    bool taken = true;
    if constexpr (STAGE != Stage::curvature) {
        totals(STAGE == Stage::step ? s.of_curvature : s.of_rr, s.count, columns, working, lines);
        const double total = lines[column], before = s.rz[column];
        double* told = STAGE == Stage::step ? s.curvature : s.rr;
        if (blockIdx.x == 0 && t < columns) told[t] = total;
        taken = total > 0.0;
        rate = taken ? before / total : 0.0;
        ratio = before > 0.0 ? total / before : 0.0;
        __syncthreads();  // before `lines` is written again
    }
    const Out damping = static_cast<Out>(s.damping), step = static_cast<Out>(rate), turn = static_cast<Out>(ratio);
    double sum = 0.0;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * working + t, hop = static_cast<int64_t>(gridDim.x) * working;
    for (int i = 0; i < group.count && t < working; ++i) {
        const Vectors<In, Out>& v = group.of[i];
        for (int64_t start = first; start < v.size; start += kTogether * hop) {
            Out x[kTogether] = {}, r[kTogether] = {}, p[kTogether] = {}, q[kTogether] = {};  // what is written may be what is read
#pragma unroll
            for (int n = 0; n < kTogether; ++n) {
                const int64_t e = start + n * hop;
                if (e >= v.size) continue;
                p[n] = static_cast<Out>(widen(v.p[e]));
                if constexpr (STAGE != Stage::direction) q[n] = static_cast<Out>(widen(v.q[e]));
                if constexpr (STAGE == Stage::step) x[n] = static_cast<Out>(widen(v.x[e])), r[n] = static_cast<Out>(widen(v.r[e]));
                if constexpr (STAGE == Stage::direction) r[n] = v.new_r[e];
            }
#pragma unroll
            for (int n = 0; n < kTogether; ++n) {
                const int64_t e = start + n * hop;
                if (e >= v.size) continue;
                if constexpr (STAGE == Stage::curvature) {
                    const double wide = static_cast<double>(p[n]);
                    sum = fma(wide, fma(s.damping, wide, static_cast<double>(q[n])), sum);
                } else if constexpr (STAGE == Stage::step) {
                    const Out rest = taken ? r[n] - step * (q[n] + damping * p[n]) : r[n];
                    v.new_x[e] = taken ? x[n] + step * p[n] : x[n];
                    v.new_r[e] = rest;
                    sum = fma(static_cast<double>(rest), static_cast<double>(rest), sum);
                } else {
                    v.new_p[e] = r[n] + turn * p[n];
                }
            }
        }
    }
    if constexpr (STAGE != Stage::direction) {
        lines[t] = sum;
        over_columns(lines, working, columns);
        if (t < columns) parts[static_cast<int64_t>(blockIdx.x) * columns + t] = lines[t];
    }
}

template <typename In>
void run(const CgArguments& a, cudaStream_t stream) {
    using Out = typename Wide<In>::type;
    const int groups = (a.tensors + kTensors - 1) / kTensors;
    const int64_t part = static_cast<int64_t>(a.blocks) * a.columns;
    double *of_curvature = a.workspace, *of_rr = a.workspace + groups * part;
    const Scalars s{a.rz, a.damping, a.curvature, a.rr, of_curvature, of_rr, groups * a.blocks, a.columns};
    for (const Stage stage : {Stage::curvature, Stage::step, Stage::direction}) {
        for (int g = 0; g < groups; ++g) {
            Group<In, Out> group{};
            for (int i = g * kTensors; i < a.tensors && group.count < kTensors; ++i) {
                const int64_t* at = a.places + 8 * static_cast<int64_t>(i);
                group.of[group.count++] = {reinterpret_cast<const In*>(at[0]), reinterpret_cast<const In*>(at[1]),
                                           reinterpret_cast<const In*>(at[2]), reinterpret_cast<const In*>(at[3]),
                                           reinterpret_cast<Out*>(at[4]),      reinterpret_cast<Out*>(at[5]),
                                           reinterpret_cast<Out*>(at[6]),      at[7]};
            }
            double* parts = (stage == Stage::curvature ? of_curvature : of_rr) + g * part;
            const auto kernel = stage == Stage::curvature ? cg_kernel<Stage::curvature, In, Out>
                                : stage == Stage::step    ? cg_kernel<Stage::step, In, Out>
                                                          : cg_kernel<Stage::direction, In, Out>;
            kernel<<<a.blocks, kThreads, 0, stream>>>(group, s, parts);
            check(cudaGetLastError(), "cg_update: a launch");
        }
    }
}

}  // namespace

int cg_columns() { return kThreads; }

int64_t cg_workspace(int tensors, int columns, int blocks) {
    const int64_t groups = (tensors + kTensors - 1) / kTensors;
    return 2 * groups * blocks * columns;
}

void cg_update(const CgArguments& a) {
    const OnDevice guard(a.device);
    const auto stream = reinterpret_cast<cudaStream_t>(a.stream);
    with_type<float, double, __nv_bfloat16, __half>(
        a.dtype, "cg_update", [&](auto of) { run<typename decltype(of)::type>(a, stream); });
}

}  // namespace hvpfast

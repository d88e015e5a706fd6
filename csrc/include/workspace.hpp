// Scratch memory and threads.
#pragma once

#include "common.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace hvpfast {

// At least `bytes`, 4096-aligned, owned by the calling thread and valid until its next call. Kept for reuse up to a
// bound: fresh pages cost more than most kernels' arithmetic. Throws std::bad_alloc.
char* workspace(int64_t bytes);
int64_t workspace_bytes();  // held by all threads of the process

// Whether a result's memory was never written. If so, and there is much of it, huge pages are asked for: the system then
// clears 2 MiB at a fault and not 4 KiB, and the result is best written through the caches, where the cleared lines are.
bool untouched(void* result, int64_t bytes);

// The largest workspace that a kernel should plan with.
constexpr int64_t kWorkspaceBound = int64_t(256) << 20;

// Hands out parts of a workspace, each on its own cache lines.
struct Carver {
    int64_t used = 0;
    int64_t take(int64_t bytes) {
        const int64_t at = used;
        used += (bytes + 63) / 64 * 64;
        return at;
    }
};

// Whether OpenMP's threads may be used; set once at import (one OpenMP library in the process).
extern bool threads_allowed;

// Runs body(index, count) on up to `threads` of OpenMP's threads, which torch's own loops use too.
template <class Body>
void parallel(int threads, const Body& body) {
#if defined(_OPENMP)
    if (threads > 1 && threads_allowed) {
#pragma omp parallel num_threads(threads)
        body(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    (void)threads;
    body(0, 1);
}

inline void barrier(int count) {
#if defined(_OPENMP)
    if (count > 1) {
#pragma omp barrier
    }
#endif
    (void)count;
}

}  // namespace hvpfast

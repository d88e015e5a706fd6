#include "workspace.hpp"

#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hvpfast {

bool threads_allowed = true;

namespace {

std::atomic<int64_t> held{0};

struct Scratch {
    char* base = nullptr;
    char* aligned = nullptr;
    int64_t bytes = 0;
    void release() {
        std::free(base);
        base = nullptr;
        held -= bytes;
        bytes = 0;
    }
    ~Scratch() { release(); }
};

thread_local Scratch scratch;

}  // namespace

int64_t workspace_bytes() { return held; }

char* workspace(int64_t bytes) {
    // A call that once needed more than the bound does not keep it.
    if (bytes > scratch.bytes || (scratch.bytes > kWorkspaceBound && bytes <= kWorkspaceBound)) {
        constexpr int64_t kAlign = int64_t(2) << 20;  // a huge page, where the system grants them
        const int64_t alignment = bytes >= kAlign ? kAlign : 4096;
        scratch.release();
        scratch.base = static_cast<char*>(std::malloc(size_t(bytes + alignment)));
        if (scratch.base == nullptr) throw std::bad_alloc();
        scratch.aligned = scratch.base + (alignment - int64_t(reinterpret_cast<uintptr_t>(scratch.base) % alignment)) % alignment;
        scratch.bytes = bytes;
        held += bytes;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (bytes >= kAlign) madvise(scratch.aligned, size_t(bytes / kAlign * kAlign), MADV_HUGEPAGE);
#endif
    }
    return scratch.aligned;
}

bool untouched(void* result, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = 4096, kHuge = uintptr_t(2) << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(result) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(result) + uintptr_t(bytes)) / kHuge * kHuge;
    if (bytes < int64_t(2 * kHuge) || last <= first) return false;
    for (const uintptr_t at : {first, (first + last) / 2, last - kPage}) {
        unsigned char resident = 1;
        if (mincore(reinterpret_cast<void*>(at / kPage * kPage), kPage, &resident) != 0 || (resident & 1)) return false;
    }
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
    return true;
#else
    (void)result, (void)bytes;
    return false;
#endif
}

}  // namespace hvpfast

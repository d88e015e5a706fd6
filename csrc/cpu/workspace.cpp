#include "workspace.hpp"

#include <atomic>
#include <cstdlib>
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

}  // namespace hvpfast

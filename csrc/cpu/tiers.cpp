// Detection of instruction sets: CPUID says what the processor has, XGETBV what the operating system saves, and for
// AMX the kernel must also grant the tile state to this process.
#include "tiers.hpp"

#include <cstdlib>
#include <stdexcept>

#if HVPFAST_X86
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hvpfast {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "amx"};

#if HVPFAST_X86
uint64_t saved_states() {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & (1u << 27))) return 0;  // no OSXSAVE
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t(high) << 32) | low;
}

std::string avx2_missing() {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return "the CPU has no AVX2 with FMA";
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & (1u << 29))) return "the CPU has no F16C";
    if ((saved_states() & 0x6) != 0x6) return "the operating system does not save the AVX registers";
    return "";
}

std::string avx512_missing() {
    std::string reason = avx2_missing();
    if (!reason.empty()) return reason;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return "the CPU has no AVX-512 (F, BW, VL and DQ)";
    if ((saved_states() & 0xe6) != 0xe6) return "the operating system does not save the AVX-512 registers";
    return "";
}

std::string amx_missing() {
    std::string reason = avx512_missing();
    if (!reason.empty()) return reason;
#if HVPFAST_AMX
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & (1u << 24)) || !(edx & (1u << 22)))
        return "the CPU has no AMX tiles with bf16 products";
    if ((saved_states() & 0x60000) != 0x60000) return "the operating system does not save the AMX tiles";
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
        return "the kernel did not grant this process the AMX tile state";
    return "";
#else
    return "AMX kernels are built on Linux, with GCC 11 or Clang 12 or later";
#endif
}
#endif

std::string find_missing(Tier tier) {
    if (tier == Tier::portable) return "";
#if HVPFAST_X86
    if (tier == Tier::avx2) return avx2_missing();
    if (tier == Tier::avx512) return avx512_missing();
    return amx_missing();
#else
    return "it needs an x86-64 CPU and a GNU-compatible compiler";
#endif
}

Tier checked(Tier tier, const std::string& origin) {
    const std::string reason = tier_missing(tier);
    if (!reason.empty()) throw std::runtime_error(origin + ": tier " + tier_name(tier) + " cannot run: " + reason);
    return tier;
}

Tier initial_tier() {
    const char* asked = std::getenv("HVPFAST_CPU");
    if (asked == nullptr || *asked == 0 || std::string(asked) == "auto") return best_tier();
    return checked(tier_from_name(asked), "HVPFAST_CPU=" + std::string(asked));
}

Tier& current() {
    static Tier tier = initial_tier();
    return tier;
}

}  // namespace

const char* tier_name(Tier tier) { return kNames[int(tier)]; }

std::string tier_missing(Tier tier) {
    static const std::string reasons[] = {find_missing(Tier::portable), find_missing(Tier::avx2),
                                          find_missing(Tier::avx512), find_missing(Tier::amx)};
    return reasons[int(tier)];
}

Tier best_tier() {
    for (int tier = 3; tier > 0; --tier)
        if (tier_missing(Tier(tier)).empty()) return Tier(tier);
    return Tier::portable;
}

Tier tier_in_use() { return current(); }
void force_tier(Tier tier) { current() = checked(tier, "force_tier"); }
void release_tier() { current() = initial_tier(); }

Tier tier_from_name(const std::string& name) {
    for (int tier = 0; tier < 4; ++tier)
        if (name == kNames[tier]) return Tier(tier);
    throw std::runtime_error("got '" + name + "' for a CPU tier; it must be portable, avx2, avx512 or amx");
}

int64_t l2_bytes() {
    static const int64_t bytes = [] {
        long found = 0;
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
        found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return int64_t(found >= (128 << 10) ? found : (1 << 20));
    }();
    return bytes;
}

}  // namespace hvpfast

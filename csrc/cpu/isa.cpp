#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace rvqa {
namespace {

bool runs_here(const Kernels& set) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (&set == &AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (&set == &AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return &set == &PORTABLE;
}

[[noreturn]] void refuse(const std::string& wanted, const std::string& why) {
    throw std::invalid_argument("RVQA_ISA is " + wanted + why + "; unset RVQA_ISA, or choose another");
}

const Kernels& pick() {
    const char* wanted = std::getenv("RVQA_ISA");
    std::string known;
    for (const Kernels* set : {
#if defined(__x86_64__) && defined(__GNUC__)
             &AVX512, &AVX2,
#endif
             &PORTABLE}) {
        if (!wanted && runs_here(*set)) return *set;
        if (wanted && std::string(wanted) == set->name) {
            if (runs_here(*set)) return *set;
            refuse(wanted, ", which this CPU cannot run");
        }
        known += std::string(known.empty() ? "" : ", ") + set->name;
    }
    refuse(wanted, "; this build has " + known);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = pick();
    return chosen;
}

}  // namespace rvqa

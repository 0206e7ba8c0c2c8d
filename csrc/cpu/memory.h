// Whether two pieces of memory overlap. Input that a kernel has checked must not change while it writes.
#pragma once

#include <cstdint>

namespace rvqa {

inline bool overlap(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
    const auto first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
    return a_bytes && b_bytes && first < second + uintptr_t(b_bytes) && second < first + uintptr_t(a_bytes);
}

}  // namespace rvqa

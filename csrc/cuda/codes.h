// Exact codes of rows in two kernels. `certify` (certify.cu) proposes codes by float16 products on tensor cores, and a
// bound certifies them (docs/exactness.md, bound (5)); it lists rows with levels that the bound leaves open. `settle`
// (settle.cu) decides those levels in float32, float64 or, if need be, exactly.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace rvqa::cuda {

constexpr int ROWS = 16;         // of a warp, or of the warps of a team
constexpr int CHUNK = 32;        // codewords scored together
constexpr int MOST_WIDTH = 1024;  // wider rows are settled without a certificate

__device__ inline float value_at(const Rows& x, int64_t n, int d) {
    const int64_t at = n * x.stride + d;
    if (x.dtype == Real::float32) return static_cast<const float*>(x.data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(x.data)[at];
    if (x.dtype == Real::float16) return float_of(bits);
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// Codes of row n, as bytes of [N, M] or as one index of [N].
struct Codes {
    uint8_t* bytes;
    int64_t* index;
    int M;

    __device__ int get(int64_t n, int m) const { return index ? int(index[n]) : bytes[n * M + m]; }
    __device__ void set(int64_t n, int m, int code) const {
        if (index) index[n] = code;
        else bytes[n * M + m] = uint8_t(code);
    }
};

// Rows with open levels: list[0] is how many, then row << 32 | mask; bit m of a mask stands for level m, bit 31 for all
// levels from 31 on.
using Open = unsigned long long*;

__device__ inline unsigned bit_of(int m) { return 1u << (m < 31 ? m : 31); }

void certify(const Rows& x, const Tables& t, const Codes& codes, Open open, Stream stream);
void settle(const Rows& x, const Tables& t, const Codes& codes, Open open, unsigned long long* found, Stream stream);

// Exact codes of all rows. `open` has room for N + 1 entries and begins with 0.
inline void find_codes(const Rows& x, const Tables& t, const Codes& codes, Open open, unsigned long long* found,
                       Stream stream) {
    if (t.width <= MOST_WIDTH) certify(x, t, codes, open, stream);
    settle(x, t, codes, open, found, stream);
}

}  // namespace rvqa::cuda

// Exact residual quantization, nearest codeword, decoding. docs/exactness.md has the definition, the bounds and their
// proof, with the same names. Memory: O(256 (K + D)) per thread.
#pragma once

#include <cstdint>

#include "cpu/tables.h"

namespace rvqa {

enum class Real { float32, bfloat16, float16 };

// Rows of a matrix. Columns are contiguous; the distance between rows (in elements) may be any.
struct Rows {
    const void* data;
    int64_t N, stride;
    Real dtype;
};

// Rows with NaN or infinity: how many, and the first (-1: none).
struct NotFinite {
    int64_t count = 0, first = -1;
};

constexpr uint8_t NO_CODE = 255;  // code in every level of a row that is not finite

// codes[N, levels]: greedy, exact, lowest index on a tie. K <= 256.
NotFinite residual_quantize(const Rows& x, const Tables& tables, int64_t levels, int threads, uint8_t* codes);

// Index of the exactly nearest codeword of level 0, and |x - codeword|^2 as Kernels::distance defines it; -1 and NaN
// for rows that are not finite.
NotFinite nearest_codeword(const Rows& x, const Tables& tables, int threads, int64_t* index, float* distance);

// norms[N, levels] = |x - sum of the codewords up to each level|: float64, codewords subtracted and squares summed in
// increasing order, rounded once to float32. NaN for rows that are not finite.
void residual_norms(const Rows& x, const uint8_t* codes, const Tables& tables, int64_t levels, int threads,
                    float* norms);

// out[N, D] = sum of codewords, added level by level in float32. codes[n * stride + m], below K.
// If codes are not below K, returns their number and writes nothing. Throws std::invalid_argument if out shares memory
// with codes or codebooks[M, K, D].
int64_t decode(const uint8_t* codes, int64_t stride, int64_t N, int64_t levels, const float* codebooks, int64_t M,
               int64_t K, int64_t D, int threads, float* out);

}  // namespace rvqa

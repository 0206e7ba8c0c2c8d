// Exact residual quantization, nearest codeword, decoding. docs/exactness.md has the definition, the bounds and their
// proof; the names here are the names there. Memory: O(256 (K + D)) a thread.
#pragma once

#include <cstdint>

#include "cpu/tables.h"

namespace rvqa {

enum class Real { float32, bfloat16, float16 };

// Rows of a matrix: contiguous columns, any distance between rows (in elements).
struct Rows {
    const void* data;
    int64_t N, stride;
    Real dtype;
};

// Rows with NaN or infinity: how many, and the first (-1: none).
struct NotFinite {
    int64_t count = 0, first = -1;
};

constexpr uint8_t NO_CODE = 255;  // in every level of a row that is not finite

// codes[N, levels]: greedy, exact, lowest index on a tie. K <= 256.
NotFinite residual_quantize(const Rows& x, const Tables& tables, int64_t levels, int threads, uint8_t* codes);

// Index of the exactly nearest codeword of level 0, and |x - codeword|^2 as Kernels::distance defines it. Rows that are not finite: -1 and NaN.
NotFinite nearest_codeword(const Rows& x, const Tables& tables, int threads, int64_t* index, float* distance);

// norms[N, levels] = |x - sum of the codewords up to each level|: float64, codewords subtracted and squares summed in
// increasing order, rounded once to float32. NaN for rows that are not finite.
void residual_norms(const Rows& x, const uint8_t* codes, const Tables& tables, int64_t levels, int threads,
                    float* norms);

// out[N, D] = sum of codewords, added level by level in float32. codes[n * stride + m], below K.
// Returns the number of codes that are not, and writes nothing then. Throws std::invalid_argument where out shares memory
// with codes or codebooks[M, K, D].
int64_t decode(const uint8_t* codes, int64_t stride, int64_t N, int64_t levels, const float* codebooks, int64_t M,
               int64_t K, int64_t D, int threads, float* out);

}  // namespace rvqa

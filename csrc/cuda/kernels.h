// The kernels as the bindings see them: pointers on the device, sizes and a stream. Calls do not wait for them.
#pragma once

#include <cstdint>
#include <stdexcept>

#ifndef RVQA_EMULATE
#include <cuda_runtime_api.h>
#endif

namespace rvqa::cuda {

#ifdef RVQA_EMULATE
using Stream = void*;
#else
using Stream = cudaStream_t;
#endif

enum class Real : int { float32, bfloat16, float16 };

struct Rows {
    const void* data;
    int64_t N, stride;  // stride in elements
    Real dtype;
};

// Tables of kernels/cuda/tables.py; K' = K rounded up to CHUNK, D' = `width`.
struct Tables {
    int M, K, D, width;
    const float* codebooks;  // [M, K, D'] with zeros beyond D
    const float* columns;    // [M, D, K'] the same, a column after the other
    const uint16_t* half;    // [M, K'/32, D'/16, 2, 32, 8] float16 of -2 c scale, as certify.cu loads them
    const float* scale;      // [M] powers of two
    const float* bias;       // [M, K'] |c|^2 scale^2, infinity for absent and repeated codewords
    const float* bound;      // [M, 3] alpha, kappa, beta, of what is scaled
    const double* norm;      // [M, K] |c|
};

// One row of counts each: pointers int64 [N + 1], or as indices.
enum class Count : int { float32, float64, int32, uint8, uint16, uint32 };

struct Counts {
    const void *indptr, *indices, *data;
    bool wide_pointers, wide_indices;  // int64, else int32
    Count dtype;
    int64_t N;
};

constexpr int64_t blocks_of(int64_t items, int64_t each) { return (items + each - 1) / each; }

// found: rows with NaN or infinity, the first of them, row levels that the bound left open. open: 0, and room for N
// numbers.
void residual_quantize(const Rows& x, const Tables& t, uint8_t* codes, unsigned long long* open, unsigned long long* found,
                       Stream stream);
void nearest_codeword(const Rows& x, const Tables& t, int64_t* index, float* distances, unsigned long long* open,
                      unsigned long long* found, Stream stream);
void decode(const uint8_t* codes, int64_t stride, int64_t N, int levels, const float* codebooks, int K, int D,
            float* out, Stream stream);
void apply_span_mask(void* logits, int64_t stride, int64_t B, int V, Real dtype, const int64_t* states,
                     const int64_t* windows, int S, Stream stream);
// totals float64 [N] over known columns (null: all); wrong[0] grows by entries that are not raw counts.
void csr_totals(const Counts& counts, int64_t columns, const uint8_t* known, double* totals, unsigned long long* wrong,
                Stream stream);
// hidden float32 [N, H]; column_map int64 (null: columns are those of W); library float64 [N] (null: sums of the rows).
// open[n] is set if a row has several fractional counts in one column; the caller fills its hidden units.
void csr_project(const Counts& counts, const int64_t* column_map, const double* library, double target_sum,
                 const float* weight, const float* bias, int64_t G, int H, float* hidden, uint8_t* open, Stream stream);

}  // namespace rvqa::cuda

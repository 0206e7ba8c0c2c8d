// Sums of rows over known columns, and the number of entries that are not raw counts. Floor: one read of each entry, 6
// to 8 bytes. Tile: a warp takes a row. Sums of whole numbers up to 2^24 are exact in float64 in any order.
#include "cuda/counts.h"

namespace rvqa::cuda {
namespace {

__global__ void __launch_bounds__(128) csr_totals_kernel(Counts counts, int64_t columns, const uint8_t* known,
                                                         double* totals, unsigned long long* wrong) {
    const int lane = threadIdx.x % WARP;
    const int64_t row = int64_t(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= counts.N) return;
    const int64_t first = integer_at(counts.indptr, counts.wide_pointers, row);
    const int64_t stop = integer_at(counts.indptr, counts.wide_pointers, row + 1);
    double total = 0;
    unsigned long long bad = 0;
    for (int64_t at = first + lane; at < stop; at += WARP) {
        const int64_t column = integer_at(counts.indices, counts.wide_indices, at);
        const double count = count_at(counts, at);
        const bool whole = count >= 0 && count <= 0x1p24 && count == floor(count);
        const bool inside = column >= 0 && column < columns;
        bad += !whole;
        bad += !inside;
        if (whole && inside && (known == nullptr || known[column])) total += count;
    }
    total = warp_sum(total);
    bad = warp_sum(bad);
    if (lane == 0) {
        totals[row] = total;
        if (bad) atomicAdd(wrong, bad);
    }
}

}  // namespace

void csr_totals(const Counts& counts, int64_t columns, const uint8_t* known, double* totals, unsigned long long* wrong,
                Stream stream) {
    if (counts.N == 0) return;
    launch("csr_totals", csr_totals_kernel, blocks_of(counts.N, 4), 128, 0, stream, counts, columns, known, totals, wrong);
}

}  // namespace rvqa::cuda

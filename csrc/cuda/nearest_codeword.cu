// Index int64 [N] of the nearest of up to 65,536 codewords, and its squared distance float32 [N]; see codes.h.
#include "cuda/codes.h"
#include "cuda/kernels.h"

namespace rvqa::cuda {
namespace {

// The distance as docs/exactness.md defines it: eight float64 sums over d mod 8, added ((0+4)+(2+6)) + ((1+5)+(3+7)).
__device__ float distance(const Rows& x, int64_t n, const float* codeword, int D) {
    double sum[8] = {};
    for (int d = 0; d < D; d += 8)
        for (int i = 0; i < 8; ++i) {
            const double gap = d + i < D ? double(value_at(x, n, d + i)) - double(codeword[d + i]) : 0.0;
            sum[i] = sum[i] + gap * gap;
        }
    return float(((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7])));
}

__global__ void __launch_bounds__(128, 3) nearest_codeword_kernel(Rows x, Tables t, int width, int64_t* index, float* distances,
                                                               unsigned long long* found) {
    RVQA_SHARED(memory);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Tile tile(memory + warp * Tile::bytes(width, 1), width);
    const int64_t first = (int64_t(blockIdx.x) * (blockDim.x / WARP) + warp) * ROWS;
    if (first >= x.N) return;
    load_rows(tile, x, first, t.D, lane);
    int code;
    const unsigned long long settled = unsigned(choose(tile, x, t, first, 0, lane, code));
    const int64_t n = first + lane;
    if (lane < ROWS && n < x.N) {
        const bool wrong = tile.wrong[lane];
        index[n] = wrong ? -1 : code;
        distances[n] = wrong ? NAN : distance(x, n, t.codebooks + int64_t(code) * t.D, t.D);
        if (wrong) report_wrong(found, n);
    }
    if (lane == 0 && settled) atomicAdd(found + 2, settled);
}

}  // namespace

void nearest_codeword(const Rows& x, const Tables& t, int64_t* index, float* distances, unsigned long long* found,
                      Stream stream) {
    if (x.N == 0) return;
    const int width = width_of(t.D, 1), warps = warps_of(Tile::bytes(width, 1));
    launch("nearest_codeword", nearest_codeword_kernel, blocks_of(x.N, warps * ROWS), warps * WARP,
           warps * Tile::bytes(width, 1), stream, x, t, width, index, distances, found);
}

}  // namespace rvqa::cuda

// Codes uint8 [N, M] of rows [N, D]; see codes.h for the floor, the tile and what is exact.
#include "cuda/codes.h"
#include "cuda/kernels.h"

namespace rvqa::cuda {
namespace {

constexpr uint8_t NO_CODE = 255;

__global__ void __launch_bounds__(128, 2) residual_quantize_kernel(Rows x, Tables t, int width, uint8_t* codes,
                                                                unsigned long long* found) {
    RVQA_SHARED(memory);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Tile tile(memory + warp * Tile::bytes(width, t.M), width);
    const int64_t first = (int64_t(blockIdx.x) * (blockDim.x / WARP) + warp) * ROWS;
    if (first >= x.N) return;
    load_rows(tile, x, first, t.D, lane);
    unsigned long long settled = 0;
    for (int m = 0; m < t.M; ++m) {
        int code;
        settled += unsigned(choose(tile, x, t, first, m, lane, code));
        if (lane < ROWS) tile.codes[lane * t.M + m] = uint8_t(code);
        __syncwarp();
        subtract(tile, t, m, lane);
        __syncwarp();
    }
    const int64_t rows = x.N - first < ROWS ? x.N - first : ROWS;
    for (int64_t i = lane; i < rows * t.M; i += WARP)
        codes[first * t.M + i] = tile.wrong[i / t.M] ? NO_CODE : tile.codes[i];
    if (lane < rows && tile.wrong[lane]) report_wrong(found, first + lane);
    if (lane == 0 && settled) atomicAdd(found + 2, settled);
}

}  // namespace

void residual_quantize(const Rows& x, const Tables& t, uint8_t* codes, unsigned long long* found, Stream stream) {
    if (x.N == 0) return;
    const int width = width_of(t.D, t.M), warps = warps_of(Tile::bytes(width, t.M));
    launch("residual_quantize", residual_quantize_kernel, blocks_of(x.N, warps * ROWS), warps * WARP,
           warps * Tile::bytes(width, t.M), stream, x, t, width, codes, found);
}

}  // namespace rvqa::cuda

// Index int64 [N] of the nearest of up to 65,536 codewords (see codes.h), and its squared distance float32 [N].
// Floor of the distance: 4 D bytes of a row. Tile: 8 lanes a row, each with the columns d mod 8 of its sum.
#include "cuda/codes.h"
#include "cuda/kernels.h"

namespace rvqa::cuda {
namespace {

// The distance as docs/exactness.md defines it: eight float64 sums over d mod 8, added ((0+4)+(2+6)) + ((1+5)+(3+7)).
__global__ void __launch_bounds__(128) distance_kernel(Rows x, Tables t, const int64_t* index, float* distances) {
    const int64_t n = int64_t(blockIdx.x) * (blockDim.x / 8) + threadIdx.x / 8;
    const int64_t code = n < x.N ? index[n] : -1;
    const float* codeword = t.codebooks + code * t.width;
    double sum = 0;
    for (int d = int(threadIdx.x) % 8; d < t.D && code >= 0; d += 8) {
        const double gap = double(value_at(x, n, d)) - double(codeword[d]);
        sum = sum + gap * gap;
    }
    for (int step = 4; step; step /= 2) sum = sum + __shfl_xor_sync(ALL, sum, step);
    if (n < x.N && threadIdx.x % 8 == 0) distances[n] = code < 0 ? NAN : float(sum);
}

}  // namespace

void nearest_codeword(const Rows& x, const Tables& t, int64_t* index, float* distances, unsigned long long* open,
                      unsigned long long* found, Stream stream) {
    if (x.N == 0) return;
    find_codes(x, t, {nullptr, index, 1}, open, found, stream);
    launch("distance", distance_kernel, blocks_of(x.N, 16), 128, 0, stream, x, t, index, distances);
}

}  // namespace rvqa::cuda

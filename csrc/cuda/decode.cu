// Sum of codewords float32 [N, D], added level by level. Floor: 4 D bytes written per row; codebooks stay in L2.
// Tile: each thread takes a value, neighbours in d, so that a warp loads and stores whole lines.
#include "cuda/device.h"

namespace rvqa::cuda {
namespace {

__global__ void __launch_bounds__(256) decode_kernel(const uint8_t* codes, int64_t stride, int64_t N, int levels,
                                                     const float* codebooks, int K, int D, float* out) {
    const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= N * D) return;
    const int64_t n = at / D, d = at % D;
    const uint8_t* code = codes + n * stride;
    float sum = codebooks[int64_t(code[0]) * D + d];  // not 0, because 0 + -0 would lose the sign
    for (int m = 1; m < levels; ++m) sum = sum + codebooks[(int64_t(m) * K + code[m]) * D + d];
    out[at] = sum;
}

}  // namespace

void decode(const uint8_t* codes, int64_t stride, int64_t N, int levels, const float* codebooks, int K, int D,
            float* out, Stream stream) {
    if (N * D == 0) return;
    launch("decode", decode_kernel, blocks_of(N * D, 256), 256, 0, stream, codes, stride, N, levels, codebooks, K, D, out);
}

}  // namespace rvqa::cuda

// Sum of codewords float32 [N, D], added level by level. Floor: 4 D bytes written per row; codebooks stay in L2.
// Tile: each thread takes WIDTH neighbours in d (4: 16 bytes), so that a warp loads and stores whole lines.
#include "cuda/device.h"

namespace rvqa::cuda {
namespace {

template <int WIDTH>
struct alignas(4 * WIDTH) Values {
    float value[WIDTH];
};

template <int WIDTH>
__global__ void __launch_bounds__(256) decode_kernel(const uint8_t* codes, int64_t stride, int64_t N, int levels,
                                                     const float* codebooks, int K, int D, float* out) {
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * WIDTH;
    if (at >= N * D) return;
    const int64_t n = N * D < 1ll << 32 ? uint32_t(at) / uint32_t(D) : at / D;
    const int d = int(at - n * D);
    const uint8_t* code = codes + n * stride;
    const auto codeword = [&](int m, int k) {
        return *reinterpret_cast<const Values<WIDTH>*>(codebooks + (int64_t(m) * K + k) * D + d);
    };
    Values<WIDTH> sum = codeword(0, code[0]);  // not 0, because 0 + -0 would lose the sign
#pragma unroll 7
    for (int m = 1; m < levels; ++m) {
        const Values<WIDTH> next = codeword(m, code[m]);
        for (int i = 0; i < WIDTH; ++i) sum.value[i] = sum.value[i] + next.value[i];
    }
    *reinterpret_cast<Values<WIDTH>*>(out + at) = sum;
}

}  // namespace

void decode(const uint8_t* codes, int64_t stride, int64_t N, int levels, const float* codebooks, int K, int D,
            float* out, Stream stream) {
    if (N * D == 0) return;
    const bool whole = D % 4 == 0 && uintptr_t(codebooks) % 16 == 0 && uintptr_t(out) % 16 == 0;
    const auto kernel = whole ? decode_kernel<4> : decode_kernel<1>;
    launch("decode", kernel, blocks_of(N * D, whole ? 1024 : 256), 256, 0, stream, codes, stride, N, levels, codebooks, K, D,
           out);
}

}  // namespace rvqa::cuda

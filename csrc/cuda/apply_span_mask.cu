// Sets logits of ids that a row may not write to -inf, in place. Floor: one write of the row's ruled-out part.
// Tile: a block takes 4,096 ids of one row; stores take 16 bytes if the row is aligned to 16 bytes.
#include "cuda/device.h"

namespace rvqa::cuda {
namespace {

constexpr int BLOCK = 4096;

template <class T>
__global__ void __launch_bounds__(256) mask_kernel(T* logits, int64_t stride, int V, T infinity, const int64_t* states,
                                                   const int64_t* windows, int S) {
    const int parts = (V + BLOCK - 1) / BLOCK, row = int(blockIdx.x / unsigned(parts));
    const int64_t state = states[row];
    if (state < 0 || state >= S) return;
    const int64_t* window = windows + 3 * state;
    const auto clamp = [](int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; };
    const int lo = int(clamp(window[0], 0, V)), hi = int(clamp(window[1], lo, V));
    const bool inside = window[2] != 0;
    const int first = int(blockIdx.x % unsigned(parts)) * BLOCK, last = first + BLOCK < V ? first + BLOCK : V;
    constexpr int EACH = 16 / sizeof(T);
    T* const line = logits + row * stride;
    const bool aligned = reinterpret_cast<uintptr_t>(line) % 16 == 0;
    for (int v = first + int(threadIdx.x) * EACH; v < last; v += int(blockDim.x) * EACH) {
        const int end = v + EACH < last ? v + EACH : last;
        const int within = (hi < end ? hi : end) - (lo > v ? lo : v), held = within > 0 ? within : 0;
        const int out = inside ? end - v - held : held;
        if (out == 0) continue;
        if (aligned && out == EACH) {
            const uint32_t word = sizeof(T) == 4 ? uint32_t(infinity) : uint32_t(infinity) * 0x10001u;
            *reinterpret_cast<uint4*>(line + v) = uint4{word, word, word, word};
        } else {
            for (int i = v; i < end; ++i)
                if ((i >= lo && i < hi) != inside) line[i] = infinity;
        }
    }
}

}  // namespace

void apply_span_mask(void* logits, int64_t stride, int64_t B, int V, Real dtype, const int64_t* states,
                     const int64_t* windows, int S, Stream stream) {
    if (B * V == 0) return;
    const int64_t grid = B * ((V + BLOCK - 1) / BLOCK);
    if (dtype == Real::float32)
        launch("apply_span_mask", mask_kernel<uint32_t>, grid, 256, 0, stream, static_cast<uint32_t*>(logits), stride, V,
               0xFF800000u, states, windows, S);
    else
        launch("apply_span_mask", mask_kernel<uint16_t>, grid, 256, 0, stream, static_cast<uint16_t*>(logits), stride, V,
               uint16_t(dtype == Real::float16 ? 0xFC00 : 0xFF80), states, windows, S);
}

}  // namespace rvqa::cuda

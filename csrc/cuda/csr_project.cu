// Rows of raw counts to the first hidden layer: size factor, log1p and a sum of rows of W. docs/exactness.md fixes the
// order, so the bits equal the CPU's. Only fmaf is fused; the compiler fuses nothing else (-fmad=false).
//
// Floor: one read of each entry, 6 to 8 bytes, and of 4 H bytes of W for each, from L2 (W has 2 to 4 MB).
// Tile: a block of 128 threads takes a row, TILE columns of the axis at a time. Counts are scattered into shared
// memory, so that columns come out in increasing order and repeated ones add up, however the file stores them. Then
// each thread adds the rows of W to its hidden units. Shared memory: TILE x 8 bytes each for counts and non-zeros.
#include "cuda/counts.h"
#include "cuda/exact_sum.h"

namespace rvqa::cuda {
namespace {

constexpr int THREADS = 128, TILE = 2048, HELD = 4;  // hidden units of a thread at a time

// The sequence of float64 operations that docs/exactness.md calls log1p.
__device__ double log1p_fixed(double y) {
    const double w = 1.0 + y;
    uint64_t bits;
    std::memcpy(&bits, &w, 8);
    int64_t exponent = int64_t(bits >> 52) - 1022;
    const uint64_t fraction = (bits & 0xFFFFFFFFFFFFFull) | 0x3FE0000000000000ull;
    double mantissa;
    std::memcpy(&mantissa, &fraction, 8);
    if (mantissa < 0x1.6a09e667f3bcdp-1) mantissa *= 2.0, --exponent;
    const double k = double(exponent);
    const bool unscaled = exponent == 0;
    const double f = unscaled ? y : mantissa - 1.0;
    const double lost = y < 1.0 ? y - (w - 1.0) : 1.0 - (w - y);
    const double correction = unscaled ? 0.0 : lost / w;
    const double s = f / (2.0 + f), z = s * s;
    double poly = 2.0 / 23;
    for (int n = 10; n >= 1; --n) {
        poly = poly * z;
        poly = poly + 2.0 / (2 * n + 1);
    }
    const double rest = s * (f - z * poly) - (k * 0x1.a39ef35793c76p-33 + correction);
    return k * 0x1.62e42feep-1 + (f - rest);
}

// Sum of all stored counts of a row, correctly rounded, in every thread; `room` is shared memory of 8 WARP bytes.
__device__ double library_of(const Counts& counts, int64_t first, int64_t stop, double* room) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    double total = 0;
    bool whole = true;
    for (int64_t at = first + threadIdx.x; at < stop; at += THREADS) {
        const double count = count_at(counts, at);
        whole &= count == floor(count);
        total += count;
    }
    total = warp_sum(total);
    whole = __ballot_sync(ALL, !whole) == 0;
    if (lane == 0) room[warp] = total, room[warp + THREADS / WARP] = whole;
    __syncthreads();
    total = 0;
    for (int i = 0; i < THREADS / WARP; ++i) total += room[i], whole &= room[i + THREADS / WARP] != 0;
    // Each partial sum of whole numbers below 2^53 is exact.
    const bool exact = whole && total < 0x1p53;
    __syncthreads();
    if (exact) return total;
    if (warp == 0) {
        ExactSum<-224, 11> sum;  // counts lie in [2^-149, 2^53], in float64
        sum.clear();
        for (int64_t at = first + lane; at < stop; at += WARP) sum.add(count_at(counts, at));
        sum.gather();
        if (lane == 0) room[0] = sum.rounded();
    }
    __syncthreads();
    total = room[0];
    __syncthreads();
    return total;
}

__global__ void __launch_bounds__(THREADS)
    csr_project_kernel(Counts counts, const int64_t* column_map, const double* library, double target_sum,
                       const float* weight, const float* bias, int64_t G, int H, float* hidden, uint8_t* open) {
    RVQA_SHARED(memory);
    double* const count_of = reinterpret_cast<double*>(memory);
    float* const value_of = reinterpret_cast<float*>(count_of + TILE);
    int32_t* const column_of = reinterpret_cast<int32_t*>(value_of + TILE);
    int32_t* const starts = column_of + TILE;  // of each thread's part of the list, and its end
    int32_t* const flags = starts + THREADS + 1;
    const int64_t row = blockIdx.x;
    const int64_t first = integer_at(counts.indptr, counts.wide_pointers, row);
    const int64_t stop = integer_at(counts.indptr, counts.wide_pointers, row + 1);
    const double size = library ? library[row] : library_of(counts, first, stop, count_of);
    const double scale = target_sum / size;
    if (threadIdx.x == 0) flags[0] = 0;
    float sum[HELD];
    for (int h0 = 0; h0 < H; h0 += THREADS * HELD) {
        for (int i = 0; i < HELD; ++i) {
            const int h = h0 + i * THREADS + int(threadIdx.x);
            sum[i] = h < H ? bias[h] : 0;
        }
        for (int64_t g0 = 0; g0 < G; g0 += TILE) {
            for (int i = threadIdx.x; i < TILE; i += THREADS) count_of[i] = 0;
            __syncthreads();
            for (int64_t at = first + threadIdx.x; at < stop; at += THREADS) {
                const int64_t stored = integer_at(counts.indices, counts.wide_indices, at);
                const int64_t column = column_map ? column_map[stored] : stored;
                if (column < g0 || column >= g0 + TILE) continue;
                const double count = count_at(counts, at);
                if (count == 0) continue;
                const double before = atomicAdd(count_of + (column - g0), count);
                // Whole numbers below 2^53 add up exactly in any order; the caller handles other repeated counts.
                const double after = before + count;
                if (before != 0 && !(before == floor(before) && count == floor(count) && after < 0x1p53)) flags[0] = 1;
            }
            __syncthreads();
            constexpr int EACH = TILE / THREADS;
            int n = 0;
            for (int i = 0; i < EACH; ++i) n += count_of[threadIdx.x * EACH + i] != 0;
            starts[threadIdx.x + 1] = n;
            if (threadIdx.x == 0) starts[0] = 0;
            __syncthreads();
            if (threadIdx.x == 0)
                for (int i = 0; i < THREADS; ++i) starts[i + 1] += starts[i];
            __syncthreads();
            int at = starts[threadIdx.x];
            for (int i = 0; i < EACH; ++i) {
                const int column = int(threadIdx.x) * EACH + i;
                const double count = count_of[column];
                if (count == 0) continue;
                value_of[at] = float(log1p_fixed(count * scale));
                column_of[at++] = column;
            }
            __syncthreads();
            const int listed = starts[THREADS];
            for (int j = 0; j < listed; ++j) {
                const float value = value_of[j];
                if (!(value > 0)) continue;
                const float* line = weight + (g0 + column_of[j]) * H;
                for (int i = 0; i < HELD; ++i) {
                    const int h = h0 + i * THREADS + int(threadIdx.x);
                    if (h < H) sum[i] = fmaf(value, line[h], sum[i]);
                }
            }
            __syncthreads();
        }
        for (int i = 0; i < HELD; ++i) {
            const int h = h0 + i * THREADS + int(threadIdx.x);
            if (h < H) hidden[row * H + h] = sum[i];
        }
    }
    if (threadIdx.x == 0) open[row] = uint8_t(flags[0]);
}

}  // namespace

void csr_project(const Counts& counts, const int64_t* column_map, const double* library, double target_sum,
                 const float* weight, const float* bias, int64_t G, int H, float* hidden, uint8_t* open, Stream stream) {
    if (counts.N == 0 || H == 0) return;
    constexpr int64_t shared = TILE * 16 + (THREADS + 2) * 4;
    launch("csr_project", csr_project_kernel, counts.N, THREADS, shared, stream, counts, column_map, library, target_sum,
           weight, bias, G, H, hidden, open);
}

}  // namespace rvqa::cuda

// Proposes the codes of rows by float16 products on tensor cores, and certifies them; see codes.h.
//
// Floor per row: 4 D bytes read and M written; 64 D M FLOP at K = 32, on tensor cores.
// Tile: 16 rows a warp for D up to 128, else a team of 2 to 8 warps, each with 128 columns, that adds up its scores in
// shared memory. Float32 residuals stay in registers, 8 values a lane and 16 columns, in the layout of the tensor
// cores' operands: columns are permuted within 16 alike for rows and codewords, so that a lane loads 16 bytes. Each
// level rounds them to float16 anew. Codewords come from L1, scaled by a power of two a level; |c|^2 is where the sums
// begin. No shared memory for one warp; 5 KB a warp of a team.
#include "cuda/codes.h"

namespace rvqa::cuda {
namespace {

constexpr float SHARP = 0x1p60f;  // makes a step of a difference that is not tiny

// Partial sums of the warps of a team.
template <int TEAM>
struct Exchange {
    float* memory;
    int side = 0;

    // Adds up the values of all warps, in one order; memory of two calls alternates.
    template <int COUNT>
    __device__ void add(float (&value)[COUNT]) {
        if (TEAM == 1) return;
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        float* const mine = memory + side * TEAM * COUNT * WARP;
        for (int i = 0; i < COUNT; ++i) mine[(warp * COUNT + i) * WARP + lane] = value[i];
        __syncthreads();
        for (int i = 0; i < COUNT; ++i) {
            float sum = mine[i * WARP + lane];
            for (int w = 1; w < TEAM; ++w) sum = sum + mine[(w * COUNT + i) * WARP + lane];
            value[i] = sum;
        }
        side = 1 - side;
    }
};

constexpr int SUMS = 20;  // 16 scores, |r|^2 and |r - its float16|^2 of two rows

__device__ inline float quad_sum(float value) {
    value += __shfl_xor_sync(ALL, value, 1);
    return value + __shfl_xor_sync(ALL, value, 2);
}

__device__ inline float quad_min(float value) {
    value = fminf(value, __shfl_xor_sync(ALL, value, 1));
    return fminf(value, __shfl_xor_sync(ALL, value, 2));
}

// Rows first + lane / 4 and 8 further, columns 16 j + 4 (lane % 4) to 3 further of each 16 of a warp.
template <int TILES>
__device__ void load(float (&left)[TILES][8], const Rows& x, int D, int64_t first, int base, bool whole, int lane) {
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int64_t n = first + lane / 4 + 8 * side;
            const int d = base + 16 * j + lane % 4 * 4;
            float* const four = &left[j][4 * side];
            if (whole) {
                const float* from = static_cast<const float*>(x.data) + n * x.stride + d;
                const float4 value = n < x.N && d < D ? *reinterpret_cast<const float4*>(from) : float4{0, 0, 0, 0};
                four[0] = value.x, four[1] = value.y, four[2] = value.z, four[3] = value.w;
            } else {
                for (int i = 0; i < 4; ++i) four[i] = n < x.N && d + i < D ? value_at(x, n, d + i) : 0.0f;
            }
        }
}

template <int TILES, int TEAM>
__global__ void __launch_bounds__(TEAM == 1 ? 128 : TEAM * WARP, 1) certify_kernel(Rows x, Tables t, Codes codes, Open open,
                                                                              bool whole) {
    RVQA_SHARED(memory);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, pair = lane % 4 * 2;
    const int64_t first = (TEAM == 1 ? int64_t(blockIdx.x) * (blockDim.x / WARP) + warp : int64_t(blockIdx.x)) * ROWS;
    if (first >= x.N) return;
    const int member = TEAM == 1 ? 0 : warp, base = member * TILES * 16;
    const int chunks = (t.K + CHUNK - 1) / CHUNK, wide = chunks * CHUNK;
    Exchange<TEAM> team{reinterpret_cast<float*>(memory)};
    float left[TILES][8];
    load<TILES>(left, x, t.D, first, base, whole, lane);
    const float growth = 1 + (float(t.width) + 16) * 0x1p-23f;
    float drift[2] = {0, 0};
    unsigned mask[2] = {0, 0};
    uint64_t packed[2] = {0, 0};
    for (int m = 0; m < t.M; ++m) {
        const float scale = t.scale[m];
        uint32_t half[TILES][4];
        float sums[SUMS];
        for (int i = 16; i < SUMS; ++i) sums[i] = 0;
#pragma unroll
        for (int j = 0; j < TILES; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // register i: row lane / 4 + 8 (i % 2), two columns
                const int side = i % 2;
                const float a = left[j][4 * side + i / 2 * 2] * scale, b = left[j][4 * side + i / 2 * 2 + 1] * scale;
                half[j][i] = halves_of(a, b);
                const float c = a - float_of(uint16_t(half[j][i])), d = b - float_of(uint16_t(half[j][i] >> 16));
                sums[16 + side] = fmaf(b, b, fmaf(a, a, sums[16 + side]));
                sums[18 + side] = fmaf(d, d, fmaf(c, c, sums[18 + side]));
            }
        float best[2] = {INFINITY, INFINITY}, limit[2], count[2] = {0, 0}, index[2] = {0, 0};
        // With one chunk of codewords its scores are kept; with more they are computed again, below the limit.
        for (int turn = 0; turn < (chunks == 1 ? 1 : 2 * chunks); ++turn) {
            const int chunk = turn % chunks;
            for (int i = 0; i < 4; ++i)
                for (int e = 0; e < 4; ++e)
                    sums[4 * i + e] = member == 0 ? t.bias[m * wide + chunk * CHUNK + 8 * i + pair + e % 2] : 0.0f;
            const uint16_t* from = t.half + (int64_t(m) * chunks + chunk) * CHUNK * t.width + base * CHUNK + lane * 8;
#pragma unroll
            for (int j = 0; j < TILES; ++j)
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    const uint4 b = *reinterpret_cast<const uint4*>(from + (2 * j + i / 2) * (8 * WARP));
                    multiply_add(*reinterpret_cast<float(*)[4]>(&sums[4 * i]), half[j], {b.x, b.y});
                    multiply_add(*reinterpret_cast<float(*)[4]>(&sums[4 * i + 4]), half[j], {b.z, b.w});
                }
            const float square[2] = {sums[16], sums[17]}, missed[2] = {sums[18], sums[19]};
            team.add(sums);
            if (turn < chunks)
                for (int i = 0; i < 16; ++i) best[i / 2 % 2] = fminf(best[i / 2 % 2], sums[i]);
            if (turn == chunks - 1)
                for (int side = 0; side < 2; ++side) {
                    const float length = sqrtf(quad_sum(sums[16 + side])) * growth + 0x1p-40f;
                    const float lost = sqrtf(quad_sum(sums[18 + side])) * growth + 0x1p-40f;
                    if (m > 0) drift[side] += 0x1p-24f * (1 + 0x1p-8f) * length * (1 / scale);
                    const float* bound = t.bound + 3 * m;
                    best[side] = quad_min(best[side]);
                    limit[side] = best[side] + (bound[0] * (length + lost) + bound[1] * (lost + drift[side] * scale) + bound[2]);
                }
            if (turn >= chunks - 1 && (chunks == 1 || turn >= chunks))
                for (int i = 0; i < 16; ++i) {
                    const int side = i / 2 % 2;
                    const float below = __saturatef(fmaf(-sums[i], SHARP, limit[side] * SHARP));
                    count[side] += below;
                    index[side] = fmaf(below, float(chunk * CHUNK + i / 4 * 8 + pair + i % 2), index[side]);
                }
            sums[16] = square[0], sums[17] = square[1], sums[18] = missed[0], sums[19] = missed[1];
        }
        int code[2];
        bool left_open = false;
        for (int side = 0; side < 2; ++side) {
            const bool certain = quad_sum(count[side]) == 1.0f;  // not so if NaN
            const float where = quad_sum(index[side]) + 0.5f;
            code[side] = certain ? int(where) : 0;
            if (!certain) mask[side] |= bit_of(m);
            left_open |= !certain;
        }
        if (chunks == 1 && __ballot_sync(ALL, left_open))  // the least score is what to go on with
            for (int side = 0; side < 2; ++side) {
                float least = float(CHUNK);
                for (int i = 0; i < 16; ++i)
                    if (i / 2 % 2 == side && sums[i] == best[side]) least = fminf(least, float(i / 4 * 8 + pair + i % 2));
                least = quad_min(least);
                if (mask[side] & bit_of(m)) code[side] = least < t.K ? int(least) : 0;
            }
        for (int side = 0; side < 2; ++side) {
            const float* codeword = t.codebooks + (int64_t(m) * t.K + code[side]) * t.width + base + lane % 4 * 4;
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
                const float4 c = *reinterpret_cast<const float4*>(codeword + 16 * j);
                float* const four = &left[j][4 * side];
                four[0] = four[0] - c.x, four[1] = four[1] - c.y, four[2] = four[2] - c.z, four[3] = four[3] - c.w;
            }
            const int64_t n = first + lane / 4 + 8 * side;
            if (member || lane % 4 || n >= x.N) continue;
            if (codes.index || t.M % 8) {
                codes.set(n, m, code[side]);
            } else {
                packed[side] = packed[side] >> 8 | uint64_t(code[side]) << 56;
                if (m % 8 == 7) *reinterpret_cast<uint64_t*>(codes.bytes + n * t.M + m - 7) = packed[side];
            }
        }
    }
    for (int side = 0; side < 2; ++side) {
        const int64_t n = first + lane / 4 + 8 * side;
        if (member || lane % 4 || n >= x.N || !mask[side]) continue;
        open[1 + atomicAdd(open, 1ull)] = static_cast<unsigned long long>(n) << 32 | mask[side];
    }
}

template <int TILES, int TEAM>
void start(const Rows& x, const Tables& t, const Codes& codes, Open open, bool whole, Stream stream) {
    const int warps = TEAM == 1 ? 4 : TEAM;
    const int64_t shared = TEAM == 1 ? 0 : 2 * TEAM * SUMS * WARP * 4;
    launch("certify", certify_kernel<TILES, TEAM>, blocks_of(x.N, TEAM == 1 ? warps * ROWS : ROWS), warps * WARP, shared,
           stream, x, t, codes, open, whole);
}

}  // namespace

void certify(const Rows& x, const Tables& t, const Codes& codes, Open open, Stream stream) {
    const bool whole = x.dtype == Real::float32 && t.D % 4 == 0 && x.stride % 4 == 0 && uintptr_t(x.data) % 16 == 0;
    switch (t.width) {
        case 16: return start<1, 1>(x, t, codes, open, whole, stream);
        case 32: return start<2, 1>(x, t, codes, open, whole, stream);
        case 64: return start<4, 1>(x, t, codes, open, whole, stream);
        case 128: return start<8, 1>(x, t, codes, open, whole, stream);
        case 256: return start<8, 2>(x, t, codes, open, whole, stream);
        case 512: return start<8, 4>(x, t, codes, open, whole, stream);
        default: return start<8, 8>(x, t, codes, open, whole, stream);
    }
}

}  // namespace rvqa::cuda

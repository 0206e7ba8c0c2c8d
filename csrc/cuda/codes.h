// Exact codes of 16 rows by one warp: float16 products on tensor cores propose, a bound certifies (docs/exactness.md,
// bound (5)), and what it leaves open the same warp settles in float64 differences and, where these cannot decide, exactly.
//
// Floor: reads 4 D bytes a row and writes M; 512 D FLOP at M = 8, K = 32, on tensor cores.
// Tile: 16 rows a warp, 32 codewords at a time. Registers: 16 sums and 16 scores a lane. Shared memory of a warp: the
// rows in float16, 16 (D' + 8) x 2 bytes with D' = D rounded up to 16, and 16 (24 + M) bytes; codewords come from L2.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "cuda/exact_sum.h"
#include "cuda/kernels.h"

namespace rvqa::cuda {

constexpr int ROWS = 16;
constexpr int CHUNK = 32;      // codewords scored together
constexpr int MOST_SHIFT = 100;  // rows and codebooks of other scales than 2^-100 to 2^100 are settled, not certified

__device__ inline float value_at(const Rows& x, int64_t n, int d) {
    const int64_t at = n * x.stride + d;
    if (x.dtype == Real::float32) return static_cast<const float*>(x.data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(x.data)[at];
    if (x.dtype == Real::float16) return float_of(bits);
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// What one warp knows of its rows, in shared memory.
struct Tile {
    uint16_t* half;   // [ROWS, width]
    float* length;    // [ROWS] at least |x| + |x - its float16|
    float* lost;      // [ROWS] at least |x - its float16|
    int32_t* shift;   // [ROWS]
    uint8_t* wrong;   // [ROWS] NaN or infinity
    uint8_t* codes;   // [ROWS, M]
    int width;

    __host__ __device__ static int64_t bytes(int D, int M) {
        const int64_t width = (D + 15) / 16 * 16 + 8;
        return (ROWS * width * 2 + ROWS * 13 + ROWS * M + 15) / 16 * 16;
    }
    __device__ Tile(unsigned char* memory, int D) {
        width = (D + 15) / 16 * 16 + 8;
        half = reinterpret_cast<uint16_t*>(memory);
        length = reinterpret_cast<float*>(half + ROWS * width);
        lost = length + ROWS;
        shift = reinterpret_cast<int32_t*>(lost + ROWS);
        wrong = reinterpret_cast<uint8_t*>(shift + ROWS);
        codes = wrong + ROWS;
    }
};

// Rows from `first` on, in float16 after a power of two that brings the largest value of each to [2^14, 2^15).
__device__ inline void load_rows(const Tile& tile, const Rows& x, int64_t first, int D, int lane) {
    const int padded = tile.width - 8;
    const float growth = 1 + (float(D) + 8) * 0x1p-23f;
    for (int row = 0; row < ROWS; ++row) {
        const int64_t n = first + row;
        const bool inside = n < x.N;
        float most = 0;
        bool finite = true;
        for (int d = lane; d < D && inside; d += WARP) {
            const float value = fabsf(value_at(x, n, d));
            finite &= value <= 0x1.fffffep127f;
            most = value > most ? value : most;
        }
        finite = __ballot_sync(ALL, !finite) == 0;
        most = finite ? warp_max(most) : (warp_max(most), 0.0f);
        const int shift = most > 0 ? 14 - ilogbf(most) : 0;
        float square = 0, missed = 0;
        for (int d = lane; d < padded; d += WARP) {
            const float value = inside && finite && d < D ? ldexpf(value_at(x, n, d), shift) : 0.0f;
            const uint16_t half = half_of(value);
            tile.half[row * tile.width + d] = half;
            const float gap = value - float_of(half);
            square += value * value;
            missed += gap * gap;
        }
        square = sqrtf(warp_sum(square)) * growth + 0x1p-40f;
        missed = sqrtf(warp_sum(missed)) * growth + 0x1p-40f;
        if (lane == 0) {
            const bool able = shift >= -MOST_SHIFT && shift <= MOST_SHIFT;
            tile.shift[row] = able ? shift : 0;
            // An infinite bound certifies nothing.
            tile.length[row] = able ? ldexpf(square + missed, -shift) * (1 + 0x1p-22f) : INFINITY;
            tile.lost[row] = able ? ldexpf(missed, -shift) : INFINITY;
            tile.wrong[row] = inside && !finite;
        }
    }
    __syncwarp();
}

// Scores of 16 rows and a chunk of codewords of level m: score[i][0..1] of row lane / 4, [i][2..3] of that + 8, codewords
// 8 i + 2 (lane % 4) and the next.
__device__ inline void score_chunk(float (&score)[4][4], const Tile& tile, const Tables& t, int m, int chunk, int lane) {
    const int group = lane / 4, pair = lane % 4 * 2, padded = tile.width - 8;
    const int wide = (t.K + CHUNK - 1) / CHUNK * CHUNK;
    for (auto& four : score)
        for (float& value : four) value = 0;
    const uint16_t* codewords = t.half + (int64_t(m) * wide + chunk * CHUNK) * padded;
    for (int d = 0; d < padded; d += 16) {
        const uint16_t* low = tile.half + group * tile.width + d + pair;
        const uint16_t* high = low + 8 * tile.width;
        uint32_t a[4];
        std::memcpy(&a[0], low, 4);
        std::memcpy(&a[1], high, 4);
        std::memcpy(&a[2], low + 8, 4);
        std::memcpy(&a[3], high + 8, 4);
        for (int i = 0; i < 4; ++i) {
            const uint16_t* codeword = codewords + int64_t(8 * i + group) * padded + d + pair;
            uint32_t b[2];
            std::memcpy(&b[0], codeword, 4);
            std::memcpy(&b[1], codeword + 8, 4);
            multiply_add(score[i], a, b);
        }
    }
    for (int side = 0; side < 2; ++side) {
        const int row = group + 8 * side;
        const int back = -(tile.shift[row] + t.shift[m]), part = back / 2;
        const float once = ldexpf(-2.0f, part), again = ldexpf(1.0f, back - part);
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 2; ++j) {
                const int k = chunk * CHUNK + 8 * i + pair + j;
                float& value = score[i][2 * side + j];
                value = value * once * again + t.bias[m * wide + k];
#pragma unroll 1
                for (int before = 0; before < m; ++before) {
                    const int64_t from = before * t.K + tile.codes[row * t.M + before];
                    value += t.gram[(from * t.M + m) * wide + k];
                }
            }
    }
}

// The same in every lane: whether codeword k of level m is strictly nearer to what is left of row n than codeword a.
class Contest {
  public:
    __device__ Contest(const Rows& x, const Tables& t, const uint8_t* codes, int64_t n, int m, int lane)
        : x_(x), t_(t), codes_(codes), n_(n), m_(m), lane_(lane) {
        double square = 0;
        for (int d = lane; d < t.D; d += WARP) {
            const double value = value_at(x, n, d);
            square += value * value;
        }
        reach_ = sqrt(warp_sum(square));
        for (int j = 0; j < m; ++j) reach_ += t.norm[j * t.K + codes[j]];
    }

    __device__ bool beats(int k, int a) const {
        const float *ck = codeword(m_, k), *ca = codeword(m_, a);
        double delta = 0, square = 0;
        for (int d = lane_; d < t_.D; d += WARP) {
            double left = value_at(x_, n_, d);
            for (int j = 0; j < m_; ++j) left -= double(codeword(j, codes_[j])[d]);
            const double gap = double(ck[d]) - double(ca[d]);
            delta += gap * ((double(ck[d]) + double(ca[d])) - 2 * left);
            square += gap * gap;
        }
        delta = warp_sum(delta), square = warp_sum(square);
        if (square == 0) return false;
        const double lengths = t_.norm[m_ * t_.K + k] + t_.norm[m_ * t_.K + a] + 2 * reach_;
        const double bound = 1.0001 * (double(t_.D) + double(m_) + 6) * 0x1p-53 * sqrt(square) * lengths;
        if (fabs(delta) > bound) return delta < 0;
        return exactly(ck, ca) < 0;
    }

  private:
    __device__ const float* codeword(int m, int k) const { return t_.codebooks + (int64_t(m) * t_.K + k) * t_.D; }

    // Products of two float32 values are multiples of 2^-298 below 2^256, twice that with the factor 2.
    __device__ __noinline__ int exactly(const float* ck, const float* ca) const {
        ExactSum<-320, 21> sum;
        sum.clear();
        for (int d = lane_; d < t_.D; d += WARP) {
            const double k = ck[d], a = ca[d], x = value_at(x_, n_, d);
            sum.add(k * k);
            sum.add(-a * a);
            sum.add(-2 * x * k);
            sum.add(2 * x * a);
            for (int j = 0; j < m_; ++j) {
                const double c = codeword(j, codes_[j])[d];
                sum.add(2 * c * k);
                sum.add(-2 * c * a);
            }
        }
        sum.gather();
        return sum.sign();
    }

    const Rows& x_;
    const Tables& t_;
    const uint8_t* codes_;
    int64_t n_;
    int m_, lane_;
    double reach_;
};

// Code of every row of the tile at level m; `code` gets that of row `lane` in lanes 0 to 15. Returns how many of the
// rows were settled.
__device__ inline int choose(const Tile& tile, const Rows& x, const Tables& t, int64_t first, int m, int lane, int& code) {
    const int group = lane / 4, pair = lane % 4 * 2, chunks = (t.K + CHUNK - 1) / CHUNK;
    const bool certify = m == 0 || t.gram != nullptr;
    float score[4][4], best[2] = {INFINITY, INFINITY}, second[2] = {INFINITY, INFINITY};
    int at[2] = {0, 0};
    for (int chunk = 0; chunk < chunks && certify; ++chunk) {
        score_chunk(score, tile, t, m, chunk, lane);
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) {
                const int side = j / 2;
                const float value = score[i][j];
                if (value < best[side]) {
                    second[side] = best[side], best[side] = value;
                    at[side] = chunk * CHUNK + 8 * i + pair + j % 2;
                } else if (!(value >= second[side])) {
                    second[side] = value;  // NaN, too: it is above no limit
                }
            }
    }
    float limit[2];
    bool open[2];
    for (int side = 0; side < 2; ++side) {
        for (int step = 1; step < 4; step *= 2) {
            const float other = __shfl_xor_sync(ALL, best[side], step), next = __shfl_xor_sync(ALL, second[side], step);
            const int where = __shfl_xor_sync(ALL, at[side], step);
            const float worse = other < best[side] ? best[side] : other;
            if (other < best[side]) best[side] = other, at[side] = where;
            if (!(worse >= second[side])) second[side] = worse;
            if (!(next >= second[side])) second[side] = next;
        }
        const int row = group + 8 * side;
        const float* bound = t.bound + 3 * m;
        limit[side] = best[side] + (bound[0] * tile.length[row] + bound[1] * tile.lost[row] + bound[2]);
        // Written so that NaN, and a NaN limit, leave the row open.
        open[side] = !(certify && second[side] > limit[side]) && first + row < x.N && !tile.wrong[row];
    }
    // Lanes 4 g hold rows g and g + 8: bit r of `left` says that row r is open.
    unsigned left = 0;
    for (int side = 0; side < 2; ++side) {
        const unsigned votes = __ballot_sync(ALL, open[side]);
        for (int row = 0; row < 8; ++row) left |= (votes >> (4 * row) & 1u) << (row + 8 * side);
    }
    const int from = __shfl_sync(ALL, at[0], lane % 8 * 4), above = __shfl_sync(ALL, at[1], lane % 8 * 4);
    code = lane < 8 ? from : above;
    const int settled = __popc(left);
    for (; left; left &= left - 1) {
        const int row = __ffs(int(left)) - 1, side = row / 8;
        const Contest contest(x, t, tile.codes + row * t.M, first + row, m, lane);
        int winner = -1;
        for (int chunk = 0; chunk < chunks; ++chunk) {
            if (certify && chunks > 1) score_chunk(score, tile, t, m, chunk, lane);
            // Bit k of `able`: codeword k of the chunk may still win.
            unsigned able = 0;
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 2; ++j) {
                    const int k = chunk * CHUNK + 8 * i + pair + j;
                    const bool may = lane / 4 == row % 8 && k < t.K && (!certify || !(score[i][2 * side + j] > limit[side]));
                    able |= unsigned(may) << (8 * i + pair + j);
                }
            for (int step = 1; step < WARP; step *= 2) able |= __shfl_xor_sync(ALL, able, step);
            for (; able; able &= able - 1) {  // upward: a later codeword takes over only if it is strictly nearer
                const int k = chunk * CHUNK + __ffs(int(able)) - 1;
                if (winner < 0 || contest.beats(k, winner)) winner = k;
            }
        }
        if (lane == row) code = winner;
    }
    return settled;
}

// Counts rows with NaN or infinity, and keeps the first: found[0], found[1].
__device__ inline void report_wrong(unsigned long long* found, int64_t row) {
    atomicAdd(found, 1ull);
    atomicMin(found + 1, static_cast<unsigned long long>(row));
}

}  // namespace rvqa::cuda

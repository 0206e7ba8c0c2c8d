// One warp finds exact codes of 16 rows. Float16 products on tensor cores propose a code, and a bound certifies it
// (docs/exactness.md, bound (5)). The warp settles what is left open by float64 differences or, if need be, exactly.
//
// Floor per row: 4 D bytes read and M written; 512 D FLOP at M = 8, K = 32, on tensor cores.
// Tile: 16 rows a warp, 32 codewords at a time; residuals stay in shared memory through all levels. Each level rounds
// them to float16 again, so that the error shrinks with them. Two lanes share a row of residuals, without bank
// conflicts. Shared memory of a warp, D' = D rounded up to 16: 16 (D' + 2) x 4 + 16 (D' + 8) x 2 bytes, and
// 16 (17 + M); codewords come from L1 and L2. Wider rows than fit are settled without a certificate.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "cuda/exact_sum.h"
#include "cuda/kernels.h"

namespace rvqa::cuda {

constexpr int ROWS = 16;
constexpr int CHUNK = 32;      // codewords scored together
constexpr int MOST_SHIFT = 100;  // rows and codebooks of scales outside 2^-100 to 2^100 are settled, not certified

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

// State of the rows of one warp, in shared memory.
struct Tile {
    float* left;      // [ROWS, padded + 2] residuals
    uint16_t* half;   // [ROWS, padded + 8] residuals times 2^shift in float16
    float* length;    // [ROWS] at least |r| + |r - its float16|
    float* lost;      // [ROWS] at least |r - its float16|, plus the distance of r to the exact residual
    float* drift;     // [ROWS] at least the distance of r to the exact residual
    int32_t* shift;   // [ROWS]
    uint8_t* wrong;   // [ROWS] NaN or infinity
    uint8_t* codes;   // [ROWS, M]
    int padded;

    static constexpr int META = ROWS * (4 * 4 + 1);

    __host__ __device__ static int64_t bytes(int width, int M) {
        return (ROWS * (int64_t(width + 2) * 4 + (width + 8) * 2) + META + ROWS * M + 15) / 16 * 16;
    }
    __device__ Tile(unsigned char* memory, int width) : padded(width) {
        left = reinterpret_cast<float*>(memory);
        half = reinterpret_cast<uint16_t*>(left + ROWS * (padded + 2));
        length = reinterpret_cast<float*>(half + ROWS * (padded + 8));
        lost = length + ROWS;
        drift = lost + ROWS;
        shift = reinterpret_cast<int32_t*>(drift + ROWS);
        wrong = reinterpret_cast<uint8_t*>(shift + ROWS);
        codes = wrong + ROWS;
    }
};

// Width of rows in shared memory: D rounded up to 16, or 0 if that does not fit.
inline int width_of(int D, int M) {
    const int padded = (D + 15) / 16 * 16;
    return Tile::bytes(padded, M) <= MOST_SHARED ? padded : 0;
}

// Loads rows from `first` on; rows that are not finite become zeros.
__device__ inline void load_rows(const Tile& tile, const Rows& x, int64_t first, int D, int lane) {
    for (int row = 0; row < ROWS; ++row) {
        const bool inside = first + row < x.N;
        bool finite = true;
        for (int d = lane; d < D && inside; d += WARP) finite &= fabsf(value_at(x, first + row, d)) <= 0x1.fffffep127f;
        finite = __ballot_sync(ALL, !finite) == 0;
        for (int d = lane; d < tile.padded; d += WARP)
            tile.left[row * (tile.padded + 2) + d] = inside && finite && d < D ? value_at(x, first + row, d) : 0.0f;
        if (lane == 0) tile.wrong[row] = inside && !finite, tile.drift[row] = 0;
    }
    __syncwarp();
}

// Subtracts the codewords just chosen from the residuals.
__device__ inline void subtract(const Tile& tile, const Tables& t, int m, int lane) {
    const int row = lane / 2;
    const float* codeword = t.codebooks + (int64_t(m) * t.K + tile.codes[row * t.M + m]) * t.D;
    float* const left = tile.left + row * (tile.padded + 2);
    for (int d = lane % 2; d < t.D && tile.padded; d += 2) left[d] = left[d] - codeword[d];
}

// Rounds residuals to float16, each times a power of two that brings its largest value to [2^14, 2^15).
__device__ inline void round_rows(const Tile& tile, int m, int lane) {
    const int row = lane / 2, part = lane % 2;
    const float growth = 1 + (float(tile.padded) + 8) * 0x1p-23f;
    const float* const left = tile.left + row * (tile.padded + 2);
    float most = 0;
    for (int d = part; d < tile.padded; d += 2) most = fabsf(left[d]) > most ? fabsf(left[d]) : most;
    const float other = __shfl_xor_sync(ALL, most, 1);
    most = other > most ? other : most;
    const int wanted = most > 0 && most <= 0x1.fffffep127f ? 14 - ilogbf(most) : 0;
    const bool able = wanted >= -MOST_SHIFT && wanted <= MOST_SHIFT && most <= 0x1.fffffep127f;
    const int shift = able ? wanted : 0;
    const float scale = ldexpf(1.0f, shift);
    float square = 0, missed = 0;
    for (int d = part; d < tile.padded; d += 2) {
        const float value = able ? left[d] * scale : 0.0f;
        const uint16_t half = half_of(value);
        tile.half[row * (tile.padded + 8) + d] = half;
        const float gap = value - float_of(half);
        square += value * value;
        missed += gap * gap;
    }
    square += __shfl_xor_sync(ALL, square, 1);
    missed += __shfl_xor_sync(ALL, missed, 1);
    if (part == 0) {
        square = ldexpf(sqrtf(square) * growth + 0x1p-40f, -shift);
        missed = ldexpf(sqrtf(missed) * growth + 0x1p-40f, -shift);
        // If `able` is false, the length of the residual is unknown, and so is the drift of later ones.
        if (m > 0) tile.drift[row] += able ? 0x1p-24f * (1 + 0x1p-8f) * square : INFINITY;
        tile.shift[row] = shift;
        // An infinite bound certifies nothing.
        tile.length[row] = able ? square + missed : INFINITY;
        tile.lost[row] = able ? missed + tile.drift[row] : INFINITY;
    }
    __syncwarp();
}

// Scores of 16 rows and a chunk of codewords of level m: score[i][0..1] of row lane / 4, [i][2..3] of that + 8, codewords
// 8 i + 2 (lane % 4) and the next.
__device__ inline void score_chunk(float (&score)[4][4], const Tile& tile, const Tables& t, int m, int chunk, int lane) {
    const int group = lane / 4, pair = lane % 4 * 2, wide = (t.K + CHUNK - 1) / CHUNK * CHUNK;
    for (auto& four : score)
        for (float& value : four) value = 0;
    const uint16_t* codewords = t.half + (int64_t(m) * wide + chunk * CHUNK) * tile.padded;
    for (int d = 0; d < tile.padded; d += 16) {
        const uint16_t* low = tile.half + group * (tile.padded + 8) + d + pair;
        const uint16_t* high = low + 8 * (tile.padded + 8);
        uint32_t a[4];
        std::memcpy(&a[0], low, 4);
        std::memcpy(&a[1], high, 4);
        std::memcpy(&a[2], low + 8, 4);
        std::memcpy(&a[3], high + 8, 4);
        for (int i = 0; i < 4; ++i) {
            const uint16_t* codeword = codewords + int64_t(8 * i + group) * tile.padded + d + pair;
            uint32_t b[2];
            std::memcpy(&b[0], codeword, 4);
            std::memcpy(&b[1], codeword + 8, 4);
            multiply_add(score[i], a, b);
        }
    }
    for (int side = 0; side < 2; ++side) {
        const int back = -(tile.shift[group + 8 * side] + t.shift[m]), part = back / 2;
        const float once = ldexpf(-2.0f, part), again = ldexpf(1.0f, back - part);
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 2; ++j) {
                float& value = score[i][2 * side + j];
                value = value * once * again + t.bias[m * wide + chunk * CHUNK + 8 * i + pair + j];
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

// Finds the code of every row of the tile at level m; in lanes 0 to 15, `code` is that of row `lane`. Returns the
// number of rows that were settled.
__device__ inline int choose(const Tile& tile, const Rows& x, const Tables& t, int64_t first, int m, int lane, int& code) {
    const int group = lane / 4, pair = lane % 4 * 2, chunks = (t.K + CHUNK - 1) / CHUNK;
    const bool certify = tile.padded > 0;  // 0: rows too wide for shared memory
    if (certify) round_rows(tile, m, lane);
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
                    second[side] = value;  // also NaN, which is above no limit
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
        // The comparison leaves the row open if a score or the limit is NaN.
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

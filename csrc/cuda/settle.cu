// Settles the levels that `certify` left open, a warp a row: all codewords in float32 and then in float64, a codeword a
// lane, then pairs of what is left by float64 differences and, if need be, exactly (docs/exactness.md, bounds (5), (3)).
//
// Floor: nothing of note as long as few rows are open; 2 D K float32 operations a level. Codewords come from L1 and L2.
// A settled code that is not the proposed one opens all later levels. Rows that are not finite get no code.
#include "cuda/codes.h"
#include "cuda/exact_sum.h"

namespace rvqa::cuda {
namespace {

constexpr int NO_CODE = -1;  // 255 as a byte

// The same in every lane: whether codeword k of level m is strictly nearer to what is left of row n than codeword a.
class Contest {
  public:
    __device__ Contest(const Rows& x, const Tables& t, const Codes& codes, int64_t n, int m, int lane)
        : x_(x), t_(t), codes_(codes), n_(n), m_(m), lane_(lane) {
        double square = 0;
        for (int d = lane; d < t.D; d += WARP) {
            const double value = value_at(x, n, d);
            square += value * value;
        }
        reach_ = sqrt(warp_sum(square));
        for (int j = 0; j < m; ++j) reach_ += t.norm[j * t.K + codes.get(n, j)];
    }

    __device__ double reach() const { return reach_; }

    __device__ bool beats(int k, int a) const {
        const float *ck = codeword(m_, k), *ca = codeword(m_, a);
        double delta = 0, square = 0;
        for (int d = lane_; d < t_.D; d += WARP) {
            double left = value_at(x_, n_, d);
            for (int j = 0; j < m_; ++j) left -= double(codeword(j, codes_.get(n_, j))[d]);
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
    __device__ const float* codeword(int m, int k) const { return t_.codebooks + (int64_t(m) * t_.K + k) * t_.width; }

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
                const double c = codeword(j, codes_.get(n_, j))[d];
                sum.add(2 * c * k);
                sum.add(-2 * c * a);
            }
        }
        sum.gather();
        return sum.sign();
    }

    const Rows& x_;
    const Tables& t_;
    const Codes& codes_;
    int64_t n_;
    int m_, lane_;
    double reach_;
};

// Score |c|^2 - 2 <r, c> of codeword 32 chunk + lane, in the arithmetic of T.
template <class T>
__device__ T score(const Rows& x, const Tables& t, const Codes& codes, int64_t n, int m, int chunk, int lane) {
    const int wide = (t.K + CHUNK - 1) / CHUNK * CHUNK;
    T sum = 0;
    for (int first = 0; first < t.D; first += WARP) {
        const int d = first + lane;
        T own = d < t.D ? T(value_at(x, n, d)) : T(0);
        for (int j = 0; j < m && d < t.D; ++j)
            own = own - T(t.codebooks[(int64_t(j) * t.K + codes.get(n, j)) * t.width + d]);
        const float* column = t.columns + (int64_t(m) * t.D + first) * wide + chunk * CHUNK + lane;
        const int most = t.D - first < WARP ? t.D - first : WARP;
#pragma unroll 8
        for (int i = 0; i < most; ++i) {
            const T left = __shfl_sync(ALL, own, i), c = T(column[int64_t(i) * wide]);
            sum = fma(c, c - 2 * left, sum);
        }
    }
    return sum;
}

// Takes each codeword that may win, given scores in T; `take` is called for each, in ascending order.
template <class T, class Take>
__device__ void for_contenders(const Rows& x, const Tables& t, const Codes& codes, int64_t n, int m, int lane, double reach,
                               Take take) {
    const int wide = (t.K + CHUNK - 1) / CHUNK * CHUNK, chunks = wide / CHUNK;
    const double unit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53, least = sizeof(T) == 4 ? (double(t.D) + 8) * 0x1p-126 : 0;
    double lowest = INFINITY, low = 0;
    for (int round = 0; round < 2; ++round)
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const int k = chunk * CHUNK + lane;
            const bool there = k < t.K && t.bias[m * wide + k] < INFINITY;
            if (round == 0 || chunks > 1) {
                const double norm = there ? t.norm[m * t.K + k] : 0;
                const double value = score<T>(x, t, codes, n, m, chunk, lane);
                const double off = 1.0001 * (double(t.D) + m + 6) * unit * norm * (norm + 2 * reach) + least;
                low = fabs(value) < INFINITY ? value - off : -INFINITY;  // float32 may overflow
                if (there && value + off < lowest) lowest = value + off;
            }
            if (round == 0) continue;
            if (chunk == 0) lowest = -warp_max(-lowest);
            unsigned may = __ballot_sync(ALL, there && !(low > lowest));
            for (; may; may &= may - 1) take(chunk * CHUNK + __ffs(int(may)) - 1);
        }
}

__device__ int nearest(const Rows& x, const Tables& t, const Codes& codes, int64_t n, int m, int lane) {
    const Contest contest(x, t, codes, n, m, lane);
    int winner = -1, contenders = 0;
    for_contenders<float>(x, t, codes, n, m, lane, contest.reach(), [&](int k) { winner = k, ++contenders; });
    if (contenders == 1) return winner;
    winner = -1;
    for_contenders<double>(x, t, codes, n, m, lane, contest.reach(), [&](int k) {
        if (winner < 0 || contest.beats(k, winner)) winner = k;  // a later codeword takes over only if strictly nearer
    });
    return winner;
}

// Counts rows with NaN or infinity, and keeps the first: found[0], found[1].
__device__ void report_wrong(unsigned long long* found, int64_t row) {
    atomicAdd(found, 1ull);
    atomicMin(found + 1, static_cast<unsigned long long>(row));
}

__global__ void __launch_bounds__(128, 4) settle_kernel(Rows x, Tables t, Codes codes, Open open, bool all,
                                                     unsigned long long* found) {
    const int lane = threadIdx.x % WARP, warps = int(blockDim.x) / WARP;
    const int64_t rows = all ? x.N : int64_t(open[0]);
    for (int64_t i = int64_t(blockIdx.x) * warps + threadIdx.x / WARP; i < rows; i += int64_t(gridDim.x) * warps) {
        const int64_t n = all ? i : int64_t(open[1 + i] >> 32);
        const unsigned mask = all ? ALL : unsigned(open[1 + i]);
        bool finite = true;
        for (int d = lane; d < t.D; d += WARP) finite &= fabsf(value_at(x, n, d)) <= 0x1.fffffep127f;
        if (__ballot_sync(ALL, !finite)) {
            for (int m = lane; m < t.M; m += WARP) codes.set(n, m, NO_CODE);
            if (lane == 0) report_wrong(found, n);
            continue;
        }
        bool changed = all;
        unsigned long long settled = 0;
        for (int m = 0; m < t.M; ++m) {
            settled += (mask & bit_of(m)) != 0;
            if (!changed && !(mask & bit_of(m))) continue;
            const int code = nearest(x, t, codes, n, m, lane);
            changed |= code != codes.get(n, m);
            __syncwarp();
            if (lane == 0) codes.set(n, m, code);
            __syncwarp();
        }
        if (lane == 0) atomicAdd(found + 2, settled);
    }
}

}  // namespace

void settle(const Rows& x, const Tables& t, const Codes& codes, Open open, unsigned long long* found, Stream stream) {
    const bool all = t.width > MOST_WIDTH;
    const int64_t blocks = blocks_of(x.N, 4);
    launch("settle", settle_kernel, blocks < 2048 ? blocks : 2048, 128, 0, stream, x, t, codes, open, all, found);
}

}  // namespace rvqa::cuda

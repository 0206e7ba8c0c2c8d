// Three rungs decide every code. Float32 scores propose; a rigorous bound on their error leaves the set S of codewords
// that may still win, nearly always one. Otherwise float64 differences settle the pairs in S, and where those are too
// close, the exact sign of a sum of float32 products.
//
//     r^_0 = x, r^_{m+1} = fl(r^_m - c_m)          s_k = fl(fl<r^, w_k> + b_k)     w_k = -2 c_k, b_k = fl(|c_k|^2)
//     rho_0 = 0, rho_{m+1} = rho_m + u |r^_{m+1}|  E = 2 C (rho + g_{D+1} |r^|) + 2.1 u C^2 + (D + 2) 2^-149
//     S = { k : not (s_k > min s + 2 E) }
//
// u = 2^-24, C = max |c_k|. One row at a time; the codebook in blocks of LANES codewords.

#include "cpu/residual_quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/exact.h"

namespace rvqa {
namespace {

constexpr double U = 0x1p-24;                 // unit roundoff of float32
constexpr double V = 0x1p-53;                 // unit roundoff of float64
constexpr double SLACK = 1 + 0x1p-20;         // covers the float64 roundings of the bound itself
constexpr double SAFE = 0x1p126;              // below this no float32 operation of the fast path overflows
constexpr double UNDERFLOW_UNIT = 0x1p-149;   // twice what one float32 product can lose by underflow
constexpr double INF = std::numeric_limits<double>::infinity();

template <class Real>
double norm(const Real* v, int64_t D) {
    double sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += double(v[d]) * double(v[d]);
    return std::sqrt(sum);
}

float round_up(double value) {
    const float rounded = float(value);
    return double(rounded) < value ? std::nextafter(rounded, std::numeric_limits<float>::infinity()) : rounded;
}

// s_k = fl(fl<r, w_k> + b_k) for one block of codewords, w [D, LANES].
void score(const float* r, const float* w, const float* b, int64_t D, float* s) {
    constexpr int64_t LANES = Quantizer::LANES;
    float sum[LANES] = {};
    for (int64_t d = 0; d < D; ++d)
        for (int64_t i = 0; i < LANES; ++i) sum[i] += r[d] * w[d * LANES + i];
    for (int64_t i = 0; i < LANES; ++i) s[i] = sum[i] + b[i];
}

}  // namespace

Quantizer::Quantizer(const float* codebooks, int64_t M, int64_t K, int64_t D) : K_(K), D_(D), levels_(M) {
    const DefaultFloatEnvironment environment;
    const double n = double(D + 1) * U;
    g_ = n < 0.25 ? n / (1 - n) : INF;
    const int64_t L = (K + LANES - 1) / LANES * LANES;
    for (int64_t m = 0; m < M; ++m) {
        Level& level = levels_[m];
        level.c = codebooks + m * K * D;
        level.w.assign(L * D, 0.0f);
        level.b.assign(L, std::numeric_limits<float>::infinity());
        level.norm.resize(K);
        for (int64_t k = 0; k < K; ++k) {
            const float* c = level.c + k * D;
            float* w = level.w.data() + k / LANES * D * LANES + k % LANES;
            for (int64_t d = 0; d < D; ++d) w[d * LANES] = -2.0f * c[d];
            level.norm[k] = norm(c, D);
            level.b[k] = float(level.norm[k] * level.norm[k]);
        }
        level.C = *std::max_element(level.norm.begin(), level.norm.end());
    }
}

template <class Code>
void Quantizer::encode(const float* x, int64_t N, int64_t levels, Code* codes) const {
    const DefaultFloatEnvironment environment;
    Row row;
    row.r.resize(D_);
    row.r64.resize(D_);
    row.s.resize(levels_[0].b.size());
    for (int64_t n = 0; n < N; ++n) {
        row.x = x + n * D_;
        std::copy(row.x, row.x + D_, row.r.begin());
        row.rho = 0;
        row.past.clear();
        for (int64_t m = 0; m < levels; ++m) {
            const Level& level = levels_[m];
            const int64_t k = nearest(level, row);
            codes[n * levels + m] = Code(k);
            const float* c = level.c + k * D_;
            row.past.push_back(c);
            for (int64_t d = 0; d < D_; ++d) row.r[d] -= c[d];
        }
    }
}

template void Quantizer::encode(const float*, int64_t, int64_t, uint8_t*) const;
template void Quantizer::encode(const float*, int64_t, int64_t, int64_t*) const;

// Rung 1: float32 scores and their certificate.
int64_t Quantizer::nearest(const Level& level, Row& row) const {
    const double nu = norm(row.r.data(), D_);
    if (!row.past.empty()) row.rho += U * nu;
    const int64_t L = int64_t(level.b.size());
    for (int64_t block = 0; block < L; block += LANES)
        score(row.r.data(), level.w.data() + block * D_, level.b.data() + block, D_, row.s.data() + block);
    const float least = *std::min_element(row.s.begin(), row.s.end());
    const double E = 2 * level.C * (row.rho + g_ * nu) + 2.1 * U * level.C * level.C + double(D_ + 2) * UNDERFLOW_UNIT;
    const bool safe = 2 * nu * level.C + level.C * level.C < SAFE && std::isfinite(E);
    if (!safe) return settle(level, row, std::numeric_limits<float>::infinity());
    const float limit = round_up(double(least) + SLACK * 2 * E);
    int64_t candidates = 0, last = 0;
    for (int64_t k = 0; k < K_; ++k) {
        const bool in_S = !(row.s[k] > limit);
        candidates += in_S;
        last = in_S ? k : last;
    }
    return candidates == 1 ? last : settle(level, row, limit);
}

// Walks S upward: a codeword takes over only if it is strictly nearer, so the lowest index wins a tie.
int64_t Quantizer::settle(const Level& level, Row& row, float limit) const {
    std::copy(row.x, row.x + D_, row.r64.begin());
    row.reach = norm(row.x, D_);
    for (const float* c : row.past) {
        for (int64_t d = 0; d < D_; ++d) row.r64[d] -= double(c[d]);
        row.reach += norm(c, D_);
    }
    int64_t best = -1;
    for (int64_t k = 0; k < K_; ++k) {
        if (row.s[k] > limit) continue;
        if (best < 0 || beats(level, row, k, best)) best = k;
    }
    return best;
}

// Whether codeword k is strictly nearer to the exact residual than codeword a: Delta = s_k - s_a < 0.
bool Quantizer::beats(const Level& level, const Row& row, int64_t k, int64_t a) const {
    const float *ck = level.c + k * D_, *ca = level.c + a * D_;
    const double m = double(row.past.size());

    // Rung 2, float64: Delta = <d, q>, d = c_k - c_a, q = c_k + c_a - 2 r.
    double Delta = 0, d_squared = 0;
    for (int64_t i = 0; i < D_; ++i) {
        const double d = double(ck[i]) - double(ca[i]);
        Delta += d * ((double(ck[i]) + double(ca[i])) - 2 * row.r64[i]);
        d_squared += d * d;
    }
    if (d_squared == 0) return false;
    const double bound = 1.0001 * (double(D_) + m + 6) * V * std::sqrt(d_squared) *
                         (level.norm[k] + level.norm[a] + 2 * row.reach);
    if (std::fabs(Delta) > bound) return Delta < 0;

    // Rung 3, exact: |c_k|^2 - |c_a|^2 - 2 <x - sum_j c_j, c_k - c_a>, every product exact in float64.
    ExactSum exact;
    for (int64_t i = 0; i < D_; ++i) {
        const double k_i = ck[i], a_i = ca[i];
        exact.add(k_i * k_i);
        exact.add(-a_i * a_i);
        exact.add(-2 * double(row.x[i]) * k_i);
        exact.add(2 * double(row.x[i]) * a_i);
        for (const float* c : row.past) {
            exact.add(2 * double(c[i]) * k_i);
            exact.add(-2 * double(c[i]) * a_i);
        }
    }
    return exact.sign() < 0;
}

void decode(const uint8_t* codes, const float* codebooks, int64_t N, int64_t levels, int64_t K, int64_t D, float* out) {
    const DefaultFloatEnvironment environment;
    for (int64_t n = 0; n < N; ++n, codes += levels, out += D) {
        const float* first = codebooks + codes[0] * D;
        std::copy(first, first + D, out);
        for (int64_t m = 1; m < levels; ++m) {
            const float* c = codebooks + (m * K + codes[m]) * D;
            for (int64_t d = 0; d < D; ++d) out[d] += c[d];
        }
    }
}

void distance(const float* x, const float* codebook, const int64_t* codes, int64_t N, int64_t D, float* out) {
    const DefaultFloatEnvironment environment;
    for (int64_t n = 0; n < N; ++n, x += D) {
        const float* c = codebook + codes[n] * D;
        double sum = 0;
        for (int64_t d = 0; d < D; ++d) {
            const double gap = double(x[d]) - double(c[d]);
            sum += gap * gap;
        }
        out[n] = float(sum);
    }
}

}  // namespace rvqa

// Three rungs decide every code. Float32 scores propose a code (kernels.inl), and a rigorous bound on their error
// leaves the set S of codewords that may still win, nearly always one. If S has more, float64 differences settle its
// pairs; if these are too close, the exact sign of a sum of float32 products does.

#include "cpu/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "cpu/exact.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/pool.h"

namespace rvqa {
namespace {

float from_half(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7FFF) << 13;
    float value;
    std::memcpy(&value, &rest, 4);
    value *= 0x1p112f;  // moves the exponent; exact, also for subnormal values
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if ((bits & 0x7C00) == 0x7C00) word |= 0x7F800000;
    word |= sign;
    std::memcpy(&value, &word, 4);
    return value;
}

float from_brain(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

void load_row(const Rows& x, int64_t n, int64_t D, float* out) {
    if (x.dtype == Real::float32) {
        std::memcpy(out, static_cast<const float*>(x.data) + n * x.stride, sizeof(float) * D);
        return;
    }
    const uint16_t* row = static_cast<const uint16_t*>(x.data) + n * x.stride;
    if (x.dtype == Real::bfloat16)
        for (int64_t d = 0; d < D; ++d) out[d] = from_brain(row[d]);
    else
        for (int64_t d = 0; d < D; ++d) out[d] = from_half(row[d]);
}

bool finite(const float* r, int64_t D) {
    return std::all_of(r, r + D, [](float value) { return std::isfinite(value); });
}

double norm_of(const float* v, int64_t D) {
    double sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += double(v[d]) * double(v[d]);
    return std::sqrt(sum);
}

// 64-byte aligned scratch.
class Floats {
  public:
    explicit Floats(int64_t n) : memory_(n + PAD) {
        float* start = memory_.data();
        const std::size_t past = reinterpret_cast<uintptr_t>(start) % 64 / sizeof(float);
        data_ = past ? start + (PAD - past) : start;
    }
    float* data() { return data_; }

  private:
    std::vector<float> memory_;
    float* data_;
};

// One row at a level, for rungs 2 and 3: it compares codewords of level m by their exact distance to the residual.
class Contest {
  public:
    explicit Contest(const Tables& tables) : t_(tables), x_(tables.D), r_(tables.D) {}

    // Takes row n of x, whose codes of the levels before m are known.
    void enter(const Rows& x, int64_t n, const uint8_t* codes, int64_t m) {
        m_ = m;
        codes_ = codes;
        load_row(x, n, t_.D, x_.data());
        std::copy(x_.begin(), x_.end(), r_.begin());
        reach_ = norm_of(x_.data(), t_.D);
        for (int64_t j = 0; j < m; ++j) {
            const float* c = t_.codeword(j, codes[j]);
            for (int64_t d = 0; d < t_.D; ++d) r_[d] -= double(c[d]);
            reach_ += t_.norm[j * t_.K + codes[j]];
        }
    }

    // Whether codeword k is strictly nearer than codeword a: Delta = t_k - t_a < 0.
    bool beats(int64_t k, int64_t a) {
        const float *ck = t_.codeword(m_, k), *ca = t_.codeword(m_, a);
        const int64_t D = t_.D;

        // Rung 2, float64: Delta = <d, q>, d = c_k - c_a, q = c_k + c_a - 2 r.
        double Delta = 0, d_squared = 0;
        for (int64_t i = 0; i < D; ++i) {
            const double d = double(ck[i]) - double(ca[i]);
            Delta += d * ((double(ck[i]) + double(ca[i])) - 2 * r_[i]);
            d_squared += d * d;
        }
        if (d_squared == 0 || !std::isfinite(Delta)) return false;  // not finite: tables that `prepare` did not make
        const double lengths = t_.norm[m_ * t_.K + k] + t_.norm[m_ * t_.K + a] + 2 * reach_;
        const double bound = 1.0001 * (double(D) + double(m_) + 6) * V * std::sqrt(d_squared) * lengths;
        if (std::fabs(Delta) > bound) return Delta < 0;

        // Rung 3, exact: |c_k|^2 - |c_a|^2 - 2 <x - sum_j c_j, c_k - c_a>, every product exact in float64.
        exact_.clear();
        for (int64_t i = 0; i < D; ++i) {
            const double k_i = ck[i], a_i = ca[i];
            exact_.add(k_i * k_i);
            exact_.add(-a_i * a_i);
            exact_.add(-2 * double(x_[i]) * k_i);
            exact_.add(2 * double(x_[i]) * a_i);
            for (int64_t j = 0; j < m_; ++j) {
                const double c_i = t_.codeword(j, codes_[j])[i];
                exact_.add(2 * c_i * k_i);
                exact_.add(-2 * c_i * a_i);
            }
        }
        return exact_.sign() < 0;
    }

  private:
    const Tables& t_;
    int64_t m_ = 0;
    const uint8_t* codes_ = nullptr;
    std::vector<float> x_;
    std::vector<double> r_;  // residual
    double reach_ = 0;       // |x| + sum of |c_j|
    ExactSum exact_;
};

// Settles rows of the tile that starts at row `first`.
class TileJudge final : public Judge {
  public:
    TileJudge(const Rows& x, const Tables& tables, int64_t levels, const uint8_t* codes)
        : x_(x), t_(tables), contest_(tables), levels_(levels), codes_(codes) {}

    int64_t first = 0;

    // Walks S upward: a codeword takes over only if it is strictly nearer, so the lowest index wins a tie.
    int64_t settle(int row, int64_t m, const float* s, float limit) override {
        contest_.enter(x_, first + row, codes_ + (first + row) * levels_, m);
        int64_t best = -1;
        for (int64_t k = 0; k < t_.K; ++k)
            if (!(s[k] > limit) && (best < 0 || contest_.beats(k, best))) best = k;
        return std::max<int64_t>(best, 0);  // -1 only if `prepare` did not make the tables
    }

  private:
    const Rows& x_;
    const Tables& t_;
    Contest contest_;
    int64_t levels_;
    const uint8_t* codes_;
};

class Tally {
  public:
    void add(int64_t row) {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++total_.count;
        if (total_.first < 0 || row < total_.first) total_.first = row;
    }
    NotFinite total() const { return total_; }

  private:
    std::mutex mutex_;
    NotFinite total_;
};

// Fills the tile at r with rows from `first` on, and their squared lengths. Rows that are not finite become zeros, and
// `wrong` lists them.
template <class Wrong>
void load_tile(const Kernels& isa, const Rows& x, const Tables& t, int64_t first, int rows, float* r, int64_t stride,
               float* squares, const Wrong& wrong) {
    for (int i = 0; i < ROWS; ++i) {
        float* row = r + i * stride;
        std::fill(row + (i < rows ? t.D : 0), row + t.padded, 0.0f);
        squares[i] = 0;
        if (i >= rows) continue;
        load_row(x, first + i, t.D, row);
        squares[i] = isa.square(row, t.padded);
        if (!std::isfinite(squares[i]) && !finite(row, t.D)) {
            wrong(first + i);
            std::fill(row, row + t.D, 0.0f);
            squares[i] = 0;
        }
    }
}

}  // namespace

NotFinite residual_quantize(const Rows& x, const Tables& t, int64_t levels, int threads, uint8_t* codes) {
    const Kernels& isa = kernels();
    Tally tally;
    parallel(x.N, 64 * ROWS, threads, [&](int64_t begin, int64_t end) {
        const DefaultFloatEnvironment environment;
        const int64_t stride = t.padded + PAD;  // rows start in different cache sets
        Floats r(ROWS * stride), s(ROWS * t.width());
        TileJudge judge(x, t, levels, codes);
        std::vector<int64_t> wrong;
        for (int64_t first = begin; first < end; first += ROWS) {
            const int rows = int(std::min<int64_t>(ROWS, end - first));
            float squares[ROWS];
            load_tile(isa, x, t, first, rows, r.data(), stride, squares, [&](int64_t row) { wrong.push_back(row); });
            judge.first = first;
            const int64_t size = x.dtype == Real::float32 ? 4 : 2, next = first + rows;
            Soon soon{};
            if (next < end)
                soon = {static_cast<const char*>(x.data) + next * x.stride * size,
                        std::min<int64_t>(ROWS, end - next), x.stride * size, t.D * size};
            isa.encode_tile(t, r.data(), stride, squares, rows, levels, s.data(), judge, codes + first * levels, soon);
        }
        for (const int64_t row : wrong) {
            std::fill(codes + row * levels, codes + (row + 1) * levels, NO_CODE);
            tally.add(row);
        }
    });
    return tally.total();
}

NotFinite nearest_codeword(const Rows& x, const Tables& t, int threads, int64_t* index, float* distance) {
    constexpr int64_t TILES = 8;
    const Kernels& isa = kernels();
    Tally tally;
    parallel(x.N, TILES * ROWS, threads, [&](int64_t begin, int64_t end) {
        const DefaultFloatEnvironment environment;
        const int64_t stride = t.padded + PAD, count = end - begin, tiles = (count + ROWS - 1) / ROWS;
        Floats r(TILES * ROWS * stride), scratch(3 * TILES * ROWS * PANEL);
        float squares[TILES * ROWS], least[TILES * ROWS], second[TILES * ROWS], limit[TILES * ROWS];
        int64_t at[TILES * ROWS];
        std::vector<int64_t> wrong, open;
        for (int64_t tile = 0; tile < tiles; ++tile)
            load_tile(isa, x, t, begin + tile * ROWS, int(std::min<int64_t>(ROWS, count - tile * ROWS)),
                      r.data() + tile * ROWS * stride, stride, squares + tile * ROWS,
                      [&](int64_t row) { wrong.push_back(row); });
        isa.nearest_tiles(t, r.data(), stride, tiles, scratch.data(), least, at, second);
        for (int64_t i = 0; i < count; ++i) {
            const Bound& bound = t.bound[0];
            const float square = squares[i] * t.square_growth + TINY;
            const float nu = std::sqrt(square) * (1 + 0x1p-20f);
            const float top = least[i] + (bound.per_nu * nu + bound.constant);
            limit[i] = nu < bound.nu_max ? top : std::numeric_limits<float>::infinity();
            index[begin + i] = at[i];
            if (!(second[i] > limit[i])) open.push_back(i);
        }
        // Contested rows are scored again, twelve at a time, to list every codeword that can still win.
        Contest contest(t);
        Floats s(ROWS * PANEL), again(ROWS * stride);
        for (std::size_t from = 0; from < open.size(); from += ROWS) {
            const int rows = int(std::min<std::size_t>(ROWS, open.size() - from));
            std::vector<int64_t> candidates[ROWS];
            std::fill(again.data(), again.data() + ROWS * stride, 0.0f);
            for (int i = 0; i < rows; ++i)
                std::copy_n(r.data() + open[from + i] * stride, t.padded, again.data() + i * stride);
            for (int64_t p = 0; p < t.panels; ++p) {
                isa.score_panel(t, again.data(), stride, p, s.data());
                for (int i = 0; i < rows; ++i)
                    for (int64_t k = 0; k < std::min(PANEL, t.K - p * PANEL); ++k)
                        if (!(s.data()[i * PANEL + k] > limit[open[from + i]])) candidates[i].push_back(p * PANEL + k);
            }
            for (int i = 0; i < rows; ++i) {
                const int64_t row = begin + open[from + i];
                contest.enter(x, row, nullptr, 0);
                int64_t best = candidates[i].front();
                for (const int64_t k : candidates[i])
                    if (k != best && contest.beats(k, best)) best = k;
                index[row] = best;
            }
        }
        for (int64_t i = 0; i < count; ++i)
            distance[begin + i] = isa.distance(r.data() + i * stride, t.codeword(0, index[begin + i]), t.padded);
        for (const int64_t row : wrong) {
            index[row] = -1;
            distance[row] = std::numeric_limits<float>::quiet_NaN();
            tally.add(row);
        }
    });
    return tally.total();
}

void residual_norms(const Rows& x, const uint8_t* codes, const Tables& t, int64_t levels, int threads, float* norms) {
    parallel(x.N, 256, threads, [&](int64_t begin, int64_t end) {
        const DefaultFloatEnvironment environment;
        std::vector<float> row(t.D);
        std::vector<double> r(t.D);
        for (int64_t n = begin; n < end; ++n) {
            load_row(x, n, t.D, row.data());
            std::copy(row.begin(), row.end(), r.begin());
            const bool whole = finite(row.data(), t.D);
            for (int64_t m = 0; m < levels; ++m) {
                double sum = 0;
                if (whole) {
                    const float* c = t.codeword(m, codes[n * levels + m]);
                    for (int64_t d = 0; d < t.D; ++d) {
                        r[d] -= double(c[d]);
                        sum += r[d] * r[d];
                    }
                }
                norms[n * levels + m] = whole ? float(std::sqrt(sum)) : std::numeric_limits<float>::quiet_NaN();
            }
        }
    });
}

int64_t decode(const uint8_t* codes, int64_t stride, int64_t N, int64_t levels, const float* codebooks, int64_t M,
               int64_t K, int64_t D, int threads, float* out) {
    if (N == 0) return 0;
    const int64_t bytes = N * D * int64_t(sizeof(float));
    if (overlap(out, bytes, codes, (N - 1) * stride + levels) ||
        overlap(out, bytes, codebooks, M * K * D * int64_t(sizeof(float))))
        throw std::invalid_argument("out shares memory with codes or codebooks; pass memory of its own");
    const Kernels& isa = kernels();
    std::atomic<int64_t> wrong{0};
    const int64_t grain = std::max<int64_t>(64, (1 << 18) / std::max<int64_t>(1, D));
    if (K < 256)
        parallel(N, grain, threads, [&](int64_t begin, int64_t end) {
            int64_t count = 0;
            for (int64_t n = begin; n < end; ++n)
                for (int64_t m = 0; m < levels; ++m) count += codes[n * stride + m] >= K;
            if (count) wrong += count;
        });
    if (wrong) return wrong;
    parallel(N, grain, threads, [&](int64_t begin, int64_t end) {
        const DefaultFloatEnvironment environment;
        isa.decode(codes + begin * stride, stride, codebooks, end - begin, levels, K, D, out + begin * D);
    });
    return 0;
}

}  // namespace rvqa

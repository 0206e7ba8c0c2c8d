// Exact residual quantization, nearest codeword and decoding for row-major float32 arrays. docs/exactness.md has the
// definition, the bounds and their proof; the names here are the names there.
//
// Memory: one transposed copy of the codebooks, and O(K + D) a thread.
#pragma once

#include <cstdint>
#include <vector>

namespace rvqa {

// One level's codebook with what the fast path needs.
struct Level {
    const float* c;            // [K, D] codewords as given; not owned
    std::vector<float> w;      // [L / LANES, D, LANES] = -2 c, padded with 0 to L = K rounded up to LANES
    std::vector<float> b;      // [L] = |c_k|^2 rounded to float32, padded with infinity
    std::vector<double> norm;  // [K] = |c_k|
    double C;                  // max |c_k|
};

class Quantizer {
  public:
    static constexpr int64_t LANES = 32;

    // codebooks [M, K, D] must outlive the object and be finite.
    Quantizer(const float* codebooks, int64_t M, int64_t K, int64_t D);

    // codes[N, levels] of x[N, D], finite; greedy, exact, lowest index on a tie.
    template <class Code>
    void encode(const float* x, int64_t N, int64_t levels, Code* codes) const;

  private:
    // State of one row between levels.
    struct Row {
        const float* x;
        std::vector<float> r;            // [D] residual rounded to float32, level by level
        double rho;                      // bound on its distance from the exact residual
        std::vector<const float*> past;  // codewords chosen so far
        std::vector<float> s;            // [L] scores
        std::vector<double> r64;         // [D] residual rounded to float64, for rung 2
        double reach;                    // |x| + sum of |c_j|, for rung 2
    };

    int64_t nearest(const Level& level, Row& row) const;
    int64_t settle(const Level& level, Row& row, float limit) const;
    bool beats(const Level& level, const Row& row, int64_t k, int64_t a) const;

    int64_t K_, D_;
    double g_;  // gamma_{D+1} of float32, infinity where it is not defined
    std::vector<Level> levels_;
};

// out[N, D] = sum of the codewords of codes[N, levels], added level by level in float32. codebooks [M, K, D].
void decode(const uint8_t* codes, const float* codebooks, int64_t N, int64_t levels, int64_t K, int64_t D, float* out);

// out[N] = |x - codeword|^2, summed in float64 in increasing d, rounded once. codebook [K, D].
void distance(const float* x, const float* codebook, const int64_t* codes, int64_t N, int64_t D, float* out);

}  // namespace rvqa

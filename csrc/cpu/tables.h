// Codebooks made ready once, in one block of memory that Python holds as a tensor. It has no pointers and is the same
// for every instruction set. docs/exactness.md has the bounds and their proof, with the same names.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rvqa {

constexpr int64_t PANEL = 32;       // codewords scored together
constexpr int64_t PAD = 16;         // codewords are padded with zeros to a multiple of this
constexpr double U = 0x1p-24;       // unit roundoff of float32
constexpr double V = 0x1p-53;       // unit roundoff of float64

// Bound of one level, each term rounded up (nu_max down): tau = per_rho * rho + per_nu * nu + constant.
struct Bound {
    float per_rho, per_nu, constant, nu_max;
};

struct Tables {
    int64_t M, K, D;
    int64_t panels;       // ceil(K / PANEL)
    int64_t padded;       // D rounded up to PAD
    float square_growth;  // |x|^2 <= square_growth * (computed sum of squares) + TINY
    const float* w;       // [M, panels, D, PANEL] = -2 c, zeros for absent codewords
    const float* b;       // [M, panels * PANEL] = |c_k|^2 rounded to float32; infinity for absent and repeated codewords
    const float* c;       // [M, K, padded]
    const double* norm;   // [M, K] = |c_k|
    const Bound* bound;   // [M]

    int64_t width() const { return panels * PANEL; }
    const float* codeword(int64_t m, int64_t k) const { return c + (m * K + k) * padded; }
};

constexpr float TINY = 0x1p-126f;

// Number of bytes that `prepare` fills for codebooks of these sizes.
std::size_t packed_size(int64_t M, int64_t K, int64_t D);

// Fills packed[packed_size] from finite codebooks[M, K, D].
void prepare(const float* codebooks, int64_t M, int64_t K, int64_t D, uint8_t* packed);

// View of what `prepare` made of codebooks of these sizes. Throws std::invalid_argument for anything else.
Tables view(const uint8_t* packed, std::size_t size, int64_t M, int64_t K, int64_t D);

}  // namespace rvqa

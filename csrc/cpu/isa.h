// The hot loops, compiled once for every instruction set (avx512.cpp, avx2.cpp, portable.cpp), picked when first used.
#pragma once

#include <cstdint>

#include "cpu/tables.h"

namespace rvqa {

constexpr int ROWS = 12;  // rows of x that are scored together
constexpr int64_t TILE = 64;  // hidden units that are computed together

// One stored count of a block of cells, ready to be projected.
struct Entry {
    uint32_t key;  // gene << 8 | cell
    float value;

    uint32_t gene() const { return key >> 8; }
    uint32_t cell() const { return key & 255; }
};

constexpr int64_t AHEAD = 32;  // entries that are looked at early

// Decides between codewords that the fast path could not tell apart. Called seldom.
class Judge {
  public:
    // Code of the tile's row at level m; only codewords k with not (s[k] > limit) can win.
    virtual int64_t settle(int row, int64_t m, const float* s, float limit) = 0;

  protected:
    ~Judge() = default;
};

struct Kernels {
    const char* name;

    // Codes of up to ROWS rows. r[ROWS, stride]: the rows, zeros behind the last one and behind D up to t.padded; the
    // residual afterwards. squares[ROWS]: what `square` gives for them. s[ROWS, t.width()] is scratch. codes[i * levels + m] of row i.
    void (*encode_tile)(const Tables& t, float* r, int64_t stride, const float* squares, int rows, int64_t levels,
                        float* s, Judge& judge, uint8_t* codes);

    // Squared length of a row padded with zeros, summed in any order.
    float (*square)(const float* r, int64_t padded);

    // s[ROWS, PANEL]: scores of a tile of rows for panel p of level 0.
    void (*score_panel)(const Tables& t, const float* r, int64_t stride, int64_t p, float* s);

    // For every row of `tiles` tiles: the least score over all codewords of level 0, where it is, and the second least.
    // scratch[3, tiles, ROWS, PANEL].
    void (*nearest_tiles)(const Tables& t, const float* r, int64_t stride, int64_t tiles, float* scratch, float* least,
                          int64_t* at, float* second);

    // |x - c|^2 in float64: eight sums over d % 8 in increasing d, added ((0+4)+(2+6))+((1+5)+(3+7)); zeros behind D.
    float (*distance)(const float* x, const float* c, int64_t padded);

    // out[n, D] = sum of codewords of codes[n, 0..levels), added level by level. codebooks[M, K, D].
    void (*decode)(const uint8_t* codes, int64_t stride, const float* codebooks, int64_t N, int64_t levels, int64_t K,
                   int64_t D, float* out);

    // Sum of counts; true where it is exact, false where it may not be (or is not finite).
    bool (*whole_sum)(const float* counts, int64_t n, double* sum);

    // out[i] = float32(log1p(counts[i] * scale)).
    void (*log1p_scaled)(const double* counts, int64_t n, double scale, float* out);

    // hidden[cell * TILE + h] += value * w[gene * H + h] for every entry in turn, h < width <= TILE; a product, then a
    // sum. Entries are sorted by gene; AHEAD more than n can be read.
    void (*project_tile)(const Entry* entries, int64_t n, const float* w, int64_t H, int64_t width, float* hidden);

    // Floors that benches measure; see kernels.inl.
    int lanes;
    float (*multiply_add)(int64_t rounds);
    void (*gather_multiply_add)(const int64_t* indptr, const int32_t* indices, const float* values, const float* w,
                                int64_t N, int64_t H, float* out);
};



// The set in use: RVQA_ISA (avx512, avx2 or portable) if it is set, else the best this CPU has.
// Throws std::runtime_error where RVQA_ISA asks for what is not there.
const Kernels& kernels();

#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels AVX512, AVX2;
#endif
extern const Kernels PORTABLE;

}  // namespace rvqa

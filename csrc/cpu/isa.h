// The hot loops, compiled once for each instruction set (avx512.cpp, avx2.cpp, portable.cpp). First use picks a set.
#pragma once

#include <cstdint>

#include "cpu/tables.h"

namespace rvqa {

constexpr int ROWS = 12;  // rows of x that are scored together
constexpr int64_t GENES = 64;  // in a word, which has a bit for each gene of a cell

// Decides between codewords that the fast path could not tell apart. It is called rarely.
class Judge {
  public:
    // Code of the tile's row at level m; only codewords k with not (s[k] > limit) can win.
    virtual int64_t settle(int row, int64_t m, const float* s, float limit) = 0;

  protected:
    ~Judge() = default;
};

// Result of `place`: values placed, entries left to the caller, and whether all columns and counts are valid.
struct Placed {
    int64_t kept, rare;
    bool valid;
};

// A row's stored entries. For each that is on the axis and above 0, dense[gene] = logs[count] if the count is whole and
// below 64; otherwise its gene and number go to rare_column and rare_entry (room for 16 more). logs null: all are.
// column_map[columns] or null as in project.h. Columns out of range cause no access outside the arrays.
using Place = Placed (*)(const void* indices, const void* data, int64_t stored, const int32_t* column_map,
                         int64_t columns, const float* logs, float* dense, int32_t* rare_column, int64_t* rare_entry);

// Memory to prefetch while the kernel computes.
struct Soon {
    const char* data;
    int64_t rows, stride, bytes;  // of a row: bytes to the next, bytes wanted
};

struct Kernels {
    const char* name;

    // Codes of up to ROWS rows. r[ROWS, stride]: the rows, zeros behind the last one and behind D up to t.padded; the
    // residual afterwards. squares[ROWS]: what `square` gives for them. s[ROWS, t.width()] is scratch. codes[i * levels + m] of row i.
    // soon: the rows of the next tile.
    void (*encode_tile)(const Tables& t, float* r, int64_t stride, const float* squares, int rows, int64_t levels,
                        float* s, Judge& judge, uint8_t* codes, const Soon& soon);

    // Squared length of a row padded with zeros; the order of the sum may be any.
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

    // bytes of one value of `width` (2 or 4) bytes, given twice in `value` where it has 2; past the caches if streamed.
    void (*fill)(char* at, int64_t bytes, int64_t width, uint32_t value, bool streamed);

    // Sum of counts. Returns true if it is exact, false if it may not be (or is not finite).
    bool (*whole_sum)(const float* counts, int64_t n, double* sum);

    // out[i] = float32(log1p(counts[i] * scale)).
    void (*log1p_scaled)(const double* counts, int64_t n, double scale, float* out);

    // By type of the indices (int32, int64) and of the counts (float, double, int32, uint32, uint16, uint8).
    const Place (*place)[6];

    // Values of one cell that are not 0, in the order of genes, to values (room for GENES more); masks[word * stride] has
    // a bit for each. dense[words * GENES] is all 0 afterwards. Returns how many there are.
    int64_t (*collect)(float* dense, int64_t words, uint64_t* masks, int64_t stride, float* values);

    // hidden[cell * H + h] = fma(value, w[gene * H + h], hidden[cell * H + h]) for the genes of one word in turn.
    // values[cell] is where the cell's values of this word begin; it is moved to those of the next.
    void (*project_word)(const uint64_t* masks, const float** values, int64_t cells, const float* w, int64_t H,
                         float* hidden);

    // Only benches call these, to measure what the machine can do at best; see kernels.inl.
    int lanes;
    float (*multiply_add)(int64_t rounds);
    void (*gather_multiply_add)(const int64_t* indptr, const int32_t* indices, const float* values, const float* w,
                                int64_t N, int64_t H, float* out);
};

// The set in use: the one in RVQA_ISA (avx512, avx2 or portable), else the best that this CPU has.
// Throws std::invalid_argument if RVQA_ISA names a set that this build or CPU does not have.
const Kernels& kernels();

#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels AVX512, AVX2;
#endif
extern const Kernels PORTABLE;

}  // namespace rvqa

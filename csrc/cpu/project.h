// Sparse rows of counts to the first hidden layer: hidden = bias + log1p(counts * target_sum / library) @ W, in one fixed
// order of IEEE operations per row (kernels/reference.py defines it), so that a row's bits depend on that row alone.
//
// Memory of a thread, for a block of at most 256 rows: 4 bytes per entry, and a bit for each row and gene (at most 4
// MB, or 16 rows).
#pragma once

#include <cstdint>

#include "cpu/sparse.h"

namespace rvqa {

struct Projection {
    const float* W;             // [G, H], G <= 2^24
    const float* bias;          // [H]
    int64_t G, H;
    double target_sum;
    const int32_t* column_map;  // [columns]: column of the counts -> row of W or -1; null: the same
    int64_t columns;
    const double* library;      // total count of each row, above 0 if it has counts; null: sum of all entries
};

// Fills hidden[N, H]. Returns false if the input is not valid; hidden is meaningless then, and nothing outside the
// arrays was read. Not valid are: row pointers not within the entries (sparse.h), columns or mapped rows out of range,
// a count that is neither 0 nor in [2^-149, 2^53], and a library size that is neither, or is 0 in a row with counts.
template <class Index, class Count>
bool csr_project(const Sparse<Index, Count>& rows, const Projection& projection, int threads, float* hidden);

}  // namespace rvqa

// Sparse rows of counts to the first hidden layer: hidden = bias + log1p(counts * target_sum / library) @ W, in one fixed
// order of IEEE operations per row (kernels/reference.py defines it), so that a row's bits depend on that row alone.
//
// Memory: O(entries of the longest row) a thread.
#pragma once

#include <cstdint>

namespace rvqa {

// Rows of a CSR matrix; indptr points at the first row wanted and holds positions in indices and data.
template <class Index, class Count>
struct Rows {
    const int64_t* indptr;
    const Index* indices;
    const Count* data;
};

struct Projection {
    const float* W;             // [G, H]
    const float* bias;          // [H]
    int64_t H;
    double target_sum;
    const int64_t* column_map;  // column of the counts -> row of W or -1; null: the same
};

// hidden[N, H]. library[N] is the total count of each row; null: the sum of all its stored entries.
// Valid input only: indices in range, counts 0 or in [2^-149, 2^53], library above 0 wherever there are counts.
template <class Index, class Count>
void csr_project(const Rows<Index, Count>& rows, const double* library, const Projection& projection, int64_t N,
                 float* hidden);

}  // namespace rvqa

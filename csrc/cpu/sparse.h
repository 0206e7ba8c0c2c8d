// Rows of a CSR matrix as the kernels see them, and the dtypes that they support.
#pragma once

#include <cstdint>

namespace rvqa {

// indptr[N + 1] holds positions in indices and data, which have E entries.
template <class Index, class Count>
struct Sparse {
    const int64_t* indptr;
    const Index* indices;
    const Count* data;
    int64_t E, N;

    // Whether row pointers never decrease, stay within the entries and give rows of fewer than 2^31.
    bool is_within() const {
        if (indptr[0] < 0 || indptr[N] > E) return false;
        for (int64_t n = 0; n < N; ++n)
            if (indptr[n + 1] < indptr[n] || indptr[n + 1] - indptr[n] >= int64_t(1) << 31) return false;
        return true;
    }
};

}  // namespace rvqa

// X(Index, Count) for every pair of dtypes that kernels on rows support.
#define RVQA_EACH_COUNT(X, Index) \
    X(Index, float)               \
    X(Index, double)              \
    X(Index, int32_t)             \
    X(Index, uint32_t)            \
    X(Index, uint16_t)            \
    X(Index, uint8_t)
#define RVQA_EACH_ROWS(X)       \
    RVQA_EACH_COUNT(X, int32_t) \
    RVQA_EACH_COUNT(X, int64_t)

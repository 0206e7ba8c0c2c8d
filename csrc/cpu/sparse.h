// Rows of a CSR matrix as the kernels see them, and the dtypes that there are.
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
};

}  // namespace rvqa

// X(Index, Count) for every pair of dtypes that a kernel on rows is built for.
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

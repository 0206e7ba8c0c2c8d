// Totals of sparse rows, and a check that the entries are raw counts. It runs before anything else is computed.
#pragma once

#include <cstdint>

#include "cpu/sparse.h"

namespace rvqa {

// total[N]: sum of each row over the columns that are known (known[columns], 0 or 1; null: all), exact for counts.
// Returns the number of entries that are not raw counts (not whole, negative, not finite, above 2^24) or have a column
// outside [0, columns), or -1 if the row pointers are not within the entries (sparse.h). Totals are meaningless then.
template <class Index, class Count>
int64_t csr_totals(const Sparse<Index, Count>& rows, const uint8_t* known, int64_t columns, int threads, double* total);

}  // namespace rvqa

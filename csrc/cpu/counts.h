// Sparse rows before anything is computed from them: are they raw counts, and how many are there in each row?
#pragma once

#include <cstdint>

#include "cpu/sparse.h"

namespace rvqa {

// total[N]: sum of each row over the columns that are known (known[columns], 0 or 1; null: all), exact for counts.
// Returns how many entries are not raw count (not whole, negative, not finite, above 2^24) or have a column outside
// [0, columns), or -1 where the row pointers are not within the entries (sparse.h); totals are of no use then.
template <class Index, class Count>
int64_t csr_totals(const Sparse<Index, Count>& rows, const uint8_t* known, int64_t columns, int threads, double* total);

}  // namespace rvqa

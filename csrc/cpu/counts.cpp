#include "cpu/counts.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <type_traits>

#include "cpu/pool.h"

namespace rvqa {
namespace {

constexpr double MOST = 0x1p24;   // float32 holds every whole number up to here
constexpr int64_t GRAIN = 1024;   // rows of one part

// There is no branch, so that the compiler can vectorise the loop.
template <class Count>
bool whole(Count value) {
    if constexpr (std::is_unsigned_v<Count>) {
        return value <= Count(std::min<double>(MOST, double(Count(-1))));
    } else if constexpr (std::is_integral_v<Count>) {
        return (value >= 0) & (value <= Count(MOST));
    } else {
        // Adding and subtracting 2^(digits) rounds any number below it to a whole one; numbers above have no fraction.
        constexpr Count big = std::is_same_v<Count, float> ? Count(0x1p23) : Count(0x1p52);
        return (value >= 0) & (value <= Count(MOST)) & (((value + big) - big == value) | (value >= big));
    }
}

template <class Index, class Count>
int64_t total_rows(const Sparse<Index, Count>& rows, const uint8_t* known, int64_t columns, int64_t begin, int64_t end,
                   double* total) {
    using Unsigned = std::make_unsigned_t<Index>;
    const Unsigned last = Unsigned(std::min<int64_t>(columns - 1, std::numeric_limits<Index>::max()));
    const bool none = columns <= 0;
    int64_t wrong = 0;
    for (int64_t n = begin; n < end; ++n) {
        const int64_t first = rows.indptr[n], stored = rows.indptr[n + 1] - first;
        const Count* data = rows.data + first;
        const Index* indices = rows.indices + first;
        int32_t bad = 0, outside = 0;
        for (int64_t e = 0; e < stored; ++e) bad += !whole(data[e]);
        for (int64_t e = 0; e < stored; ++e) outside += none | (Unsigned(indices[e]) > last);  // negative ones are large
        wrong += bad + outside;
        // Whole numbers up to 2^24, at most 2^29 of them: exact in 53 bits, in any order.
        // There are eight sums, so that no addition waits for the one before.
        double part[8] = {}, sum = 0;
        int64_t e = 0;
        if (!known) {
            for (; e + 8 <= stored; e += 8)
                for (int i = 0; i < 8; ++i) part[i] += double(data[e + i]);
            for (; e < stored; ++e) sum += double(data[e]);
        } else if (!outside) {
            for (; e + 8 <= stored; e += 8)
                for (int i = 0; i < 8; ++i) part[i] += known[indices[e + i]] ? double(data[e + i]) : 0.0;
            for (; e < stored; ++e) sum += known[indices[e]] ? double(data[e]) : 0.0;
        }
        for (const double each : part) sum += each;
        total[n] = sum;
    }
    return wrong;
}

}  // namespace

template <class Index, class Count>
int64_t csr_totals(const Sparse<Index, Count>& rows, const uint8_t* known, int64_t columns, int threads, double* total) {
    if (!rows.is_within()) return -1;
    std::atomic<int64_t> wrong{0};
    parallel(rows.N, GRAIN, threads, [&](int64_t begin, int64_t end) {
        wrong += total_rows(rows, known, columns, begin, end, total);
    });
    return wrong;
}

#define RVQA_INSTANTIATE(Index, Count) \
    template int64_t csr_totals(const Sparse<Index, Count>&, const uint8_t*, int64_t, int, double*);
RVQA_EACH_ROWS(RVQA_INSTANTIATE)

}  // namespace rvqa

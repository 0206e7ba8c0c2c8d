// One row at a time: library size, entries in increasing column order, then one multiply and one add for every entry and
// hidden unit, without fusing. Sums of counts are correctly rounded, so the order of the stored entries leaves no trace.

#include "cpu/csr_project.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/exact.h"

namespace rvqa {
namespace {

constexpr double LN2_HI = 0x1.62e42feep-1;  // leading 32 bits of ln 2: exact times any exponent
constexpr double LN2_LO = 0x1.a39ef35793c76p-33;
constexpr double SQRT_HALF = 0x1.6a09e667f3bcdp-1;

// log(1 + y) of finite y >= 0; the same operations in the same order as `log1p` in kernels/reference.py.
double log1p_fixed(double y) {
    const double w = 1.0 + y;
    int exponent;
    double mantissa = std::frexp(w, &exponent);
    if (mantissa < SQRT_HALF) {
        mantissa *= 2.0;
        --exponent;
    }
    const double k = exponent;
    double f = y, correction = 0.0;
    if (exponent != 0) {
        f = mantissa - 1.0;
        correction = (y < 1.0 ? y - (w - 1.0) : 1.0 - (w - y)) / w;
    }
    const double s = f / (2.0 + f);
    const double z = s * s;
    double poly = 2.0 / 23.0;
    for (int n = 10; n >= 1; --n) poly = poly * z + 2.0 / double(2 * n + 1);
    const double rest = s * (f - z * poly) - (k * LN2_LO + correction);
    return k * LN2_HI + (f - rest);
}

struct Entry {
    int64_t column;
    double count;
};

// Correctly rounded sum: plain while all counts are whole and their sum is exact, an expansion otherwise.
template <class Count>
double total(const Count* data, int64_t n, ExactSum& exact) {
    double sum = 0;
    bool whole = true;
    for (int64_t i = 0; i < n; ++i) {
        const double count = double(data[i]);
        whole &= count == std::floor(count);
        sum += count;
    }
    if (whole && sum < 0x1p53) return sum;
    exact.clear();
    for (int64_t i = 0; i < n; ++i) exact.add(double(data[i]));
    return exact.rounded();
}

// Sorts by column and adds up entries of the same column.
void merge(std::vector<Entry>& entries, ExactSum& exact) {
    const auto before = [](const Entry& a, const Entry& b) { return a.column < b.column; };
    if (!std::is_sorted(entries.begin(), entries.end(), before)) std::sort(entries.begin(), entries.end(), before);
    std::size_t kept = 0;
    for (std::size_t i = 0; i < entries.size();) {
        std::size_t end = i + 1;
        while (end < entries.size() && entries[end].column == entries[i].column) ++end;
        Entry merged = entries[i];
        if (end - i > 1) {
            exact.clear();
            for (std::size_t j = i; j < end; ++j) exact.add(entries[j].count);
            merged.count = exact.rounded();
        }
        entries[kept++] = merged;
        i = end;
    }
    entries.resize(kept);
}

}  // namespace

template <class Index, class Count>
void csr_project(const Rows<Index, Count>& rows, const double* library, const Projection& projection, int64_t N,
                 float* hidden) {
    const DefaultFloatEnvironment environment;
    const int64_t H = projection.H;
    std::vector<Entry> entries;
    ExactSum exact;
    for (int64_t n = 0; n < N; ++n, hidden += H) {
        const int64_t begin = rows.indptr[n], end = rows.indptr[n + 1];
        entries.clear();
        for (int64_t e = begin; e < end; ++e) {
            const int64_t stored = int64_t(rows.indices[e]);
            const int64_t column = projection.column_map ? projection.column_map[stored] : stored;
            const double count = double(rows.data[e]);
            if (column >= 0 && count > 0) entries.push_back({column, count});
        }
        merge(entries, exact);
        const double size = library ? library[n] : total(rows.data + begin, end - begin, exact);
        const double scale = projection.target_sum / size;
        std::copy(projection.bias, projection.bias + H, hidden);
        for (const Entry& entry : entries) {
            const float value = float(log1p_fixed(entry.count * scale));
            const float* w = projection.W + entry.column * H;
            for (int64_t h = 0; h < H; ++h) hidden[h] += value * w[h];
        }
    }
}

#define RVQA_INSTANTIATE(Index, Count)                                                                             \
    template void csr_project(const Rows<Index, Count>&, const double*, const Projection&, int64_t, float*);
#define RVQA_INSTANTIATE_COUNTS(Index)                                                                             \
    RVQA_INSTANTIATE(Index, float)                                                                                 \
    RVQA_INSTANTIATE(Index, double)                                                                                \
    RVQA_INSTANTIATE(Index, int32_t)                                                                               \
    RVQA_INSTANTIATE(Index, uint16_t)                                                                              \
    RVQA_INSTANTIATE(Index, uint8_t)
RVQA_INSTANTIATE_COUNTS(int32_t)
RVQA_INSTANTIATE_COUNTS(int64_t)

}  // namespace rvqa

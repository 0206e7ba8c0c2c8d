// Cells are projected in blocks. A cell's values are first scattered into a dense row by gene, then collected in the
// order of genes, so the file's order costs nothing. Words have a bit for each of 64 genes. The product takes a word
// at a time: its rows of W stay in the first cache for all cells of the block, a cell's hidden units in registers.

#include "cpu/project.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/exact.h"
#include "cpu/isa.h"
#include "cpu/pool.h"

namespace rvqa {
namespace {

constexpr int64_t CELLS = 256;               // at most in a block: their hidden units stay in the second cache
constexpr int64_t WORDS = int64_t(1) << 19;  // in a block: 4 MB of masks, unless 16 cells have more
constexpr int64_t ENTRIES = int64_t(1) << 22;  // in a block, unless one row has more
constexpr int TABLE = 64;                    // counts below this share one log1p a cell: see Place

template <class Count>
bool is_count(Count count) {
    if constexpr (std::is_unsigned_v<Count>)
        return true;
    else if constexpr (std::is_same_v<Count, double>)
        return (count >= 0x1p-149 && count <= 0x1p53) || count == 0;
    else
        return count >= 0 && double(count) <= 0x1p53;
}

// Correctly rounded sum: a plain one if all counts are whole and their sum is exact, otherwise an expansion.
template <class Count>
double total(const Count* data, int64_t n, const Kernels& isa, ExactSum& exact) {
    double sum = 0;
    bool whole = true;
    if constexpr (std::is_same_v<Count, float>) {
        if (isa.whole_sum(data, n, &sum) || !std::isfinite(sum)) return sum;
        whole = false;
    } else if constexpr (std::is_same_v<Count, double>) {
        for (int64_t i = 0; i < n; ++i) {
            whole &= data[i] == std::floor(data[i]);
            sum += data[i];
        }
    } else {
        int64_t all = 0;  // 2^31 entries of 32 bits fit
        for (int64_t i = 0; i < n; ++i) all += int64_t(data[i]);
        sum = double(all);
    }
    if ((whole && sum < 0x1p53) || !std::isfinite(sum)) return sum;
    exact.clear();
    for (int64_t i = 0; i < n; ++i) {
        if (!is_count(data[i])) return std::numeric_limits<double>::quiet_NaN();  // its row is rejected
        exact.add(double(data[i]));
    }
    return exact.rounded();
}

// Scratch of one thread.
struct Scratch {
    std::vector<float> dense;      // one cell's values by gene
    std::vector<float> value;      // values of the block's cells
    std::vector<uint64_t> mask;    // [words, cells]
    std::vector<const float*> at;  // [cells]: values of the next word
    std::array<double, TABLE> small; // 0, 1, 2, ...
    std::vector<double> rare_count;
    std::vector<float> rare_value;
    std::vector<int32_t> rare_column;
    std::vector<int64_t> rare_entry;
    std::vector<uint8_t> repeated; // [cells]: rows where a gene is stored more than once
    ExactSum exact;

    Scratch() {
        for (int i = 0; i < TABLE; ++i) small[i] = i;
    }
};

// Projects row n by the plain definition: entries of the same gene are summed first.
template <class Index, class Count>
void project_row(const Sparse<Index, Count>& rows, const Projection& p, int64_t n, double scale, const Kernels& isa,
                 ExactSum& exact, float* hidden) {
    struct Stored {
        int64_t column;
        double count;
    };
    std::vector<Stored> entries;
    for (int64_t e = rows.indptr[n]; e < rows.indptr[n + 1]; ++e) {
        const int64_t column = p.column_map ? p.column_map[rows.indices[e]] : int64_t(rows.indices[e]);
        if (column >= 0 && rows.data[e] > 0) entries.push_back({column, double(rows.data[e])});
    }
    std::sort(entries.begin(), entries.end(), [](const Stored& a, const Stored& b) { return a.column < b.column; });
    std::copy(p.bias, p.bias + p.H, hidden);
    for (std::size_t i = 0; i < entries.size();) {
        exact.clear();
        const int64_t column = entries[i].column;
        for (; i < entries.size() && entries[i].column == column; ++i) exact.add(entries[i].count);
        const double count = exact.rounded();
        float value;
        isa.log1p_scaled(&count, 1, scale, &value);
        if (!(value > 0)) continue;
        for (int64_t h = 0; h < p.H; ++h) hidden[h] = std::fma(value, p.W[column * p.H + h], hidden[h]);
    }
}

template <class Index, class Count>
Place place_of(const Kernels& isa) {
    constexpr int index = std::is_same_v<Index, int64_t>,
                  count = std::is_same_v<Count, float>      ? 0
                          : std::is_same_v<Count, double>   ? 1
                          : std::is_same_v<Count, int32_t>  ? 2
                          : std::is_same_v<Count, uint32_t> ? 3
                          : std::is_same_v<Count, uint16_t> ? 4
                                                            : 5;
    return isa.place[index][count];
}

// Scatters the values of row n into `dense` by gene. Returns their number, more than distinct genes if one is stored
// twice. Sets `invalid` for a column that does not exist or a value that is not a count.
template <class Index, class Count>
int64_t place_row(const Sparse<Index, Count>& rows, const Projection& p, int64_t n, double scale, const Kernels& isa,
                  Scratch& own, bool& invalid) {
    const int64_t begin = rows.indptr[n], stored = rows.indptr[n + 1] - begin;
    const Count* data = rows.data + begin;
    // log1p is computed once for each small count; other counts get their own below.
    float logs[TABLE];
    if (stored >= TABLE) isa.log1p_scaled(own.small.data(), TABLE, scale, logs);
    const Placed placed =
        place_of<Index, Count>(isa)(rows.indices + begin, data, stored, p.column_map, p.columns,
                                    stored >= TABLE ? logs : nullptr, own.dense.data(), own.rare_column.data(),
                                    own.rare_entry.data());
    invalid |= !placed.valid | (placed.kept > 0 && !(scale < std::numeric_limits<double>::infinity()));
    for (int64_t i = 0; i < placed.rare; ++i) own.rare_count[i] = double(data[own.rare_entry[i]]);
    isa.log1p_scaled(own.rare_count.data(), placed.rare, scale, own.rare_value.data());
    for (int64_t i = 0; i < placed.rare; ++i) own.dense[own.rare_column[i]] = own.rare_value[i];
    return placed.kept;
}

// Projects rows [first, last), at most CELLS. Returns false if they are not valid.
template <class Index, class Count>
bool project_block(const Sparse<Index, Count>& rows, const Projection& p, int64_t first, int64_t last,
                   const Kernels& isa, Scratch& own, float* hidden) {
    const int64_t stored = rows.indptr[last] - rows.indptr[first], cells = last - first;
    const int64_t words = (p.G + GENES - 1) / GENES;
    int64_t longest = 0;
    for (int64_t n = first; n < last; ++n) longest = std::max(longest, rows.indptr[n + 1] - rows.indptr[n]);
    const auto grow = [](auto& vector, int64_t size) {
        if (int64_t(vector.size()) < size) vector.resize(size);
    };
    own.dense.resize(words * GENES);
    grow(own.value, stored + GENES);
    grow(own.mask, words * cells);
    grow(own.rare_column, longest + 16), grow(own.rare_entry, longest + 16);
    grow(own.rare_count, longest), grow(own.rare_value, longest);
    own.at.resize(CELLS);
    own.repeated.assign(CELLS, 0);

    double scale[CELLS];
    bool invalid = false;
    float* values = own.value.data();
    for (int64_t i = 0; i < cells; ++i) {
        const int64_t n = first + i, begin = rows.indptr[n];
        const double size = p.library ? p.library[n] : total(rows.data + begin, rows.indptr[n + 1] - begin, isa, own.exact);
        scale[i] = p.target_sum / size;
        const int64_t kept = place_row(rows, p, n, scale[i], isa, own, invalid);
        own.at[i] = values;
        const int64_t places = isa.collect(own.dense.data(), words, own.mask.data() + i, cells, values);
        own.repeated[i] = places != kept;
        values += places;
        if (!p.library) continue;
        invalid |= !is_count(size);
        if (size == 0)  // or -0
            invalid |= std::any_of(rows.data + begin, rows.data + rows.indptr[n + 1], [](Count count) { return count > 0; });
    }
    if (invalid) return false;

    float* out = hidden + first * p.H;
    for (int64_t i = 0; i < cells; ++i) std::copy_n(p.bias, p.H, out + i * p.H);
    for (int64_t word = 0; word < words; ++word)
        isa.project_word(own.mask.data() + word * cells, own.at.data(), cells, p.W + word * GENES * p.H, p.H, out);
    for (int64_t i = 0; i < cells; ++i)
        if (own.repeated[i]) project_row(rows, p, first + i, scale[i], isa, own.exact, out + i * p.H);
    return true;
}

}  // namespace

template <class Index, class Count>
bool csr_project(const Sparse<Index, Count>& rows, const Projection& p, int threads, float* hidden) {
    const Kernels& isa = kernels();
    if (!rows.is_within()) return false;
    if (p.column_map)
        for (int64_t i = 0; i < p.columns; ++i)
            if (p.column_map[i] < -1 || p.column_map[i] >= p.G) return false;
    std::atomic<bool> valid{true};
    // A part is one block, but a single thread takes several at once.
    const int64_t cells = std::clamp<int64_t>(WORDS / std::max<int64_t>(1, (p.G + GENES - 1) / GENES), 16, CELLS);
    const int64_t grain = std::max<int64_t>(1, std::min(cells, (rows.N + threads - 1) / threads));
    parallel(rows.N, grain, threads, [&](int64_t begin, int64_t end) {
        const DefaultFloatEnvironment environment;
        thread_local Scratch own;
        for (int64_t first = begin; first < end;) {
            int64_t last = first + 1;
            while (last < end && rows.indptr[last + 1] - rows.indptr[first] <= ENTRIES) ++last;
            if (!project_block(rows, p, first, last, isa, own, hidden)) valid = false;
            first = last;
        }
    });
    return valid;
}

#define RVQA_INSTANTIATE(Index, Count) template bool csr_project(const Sparse<Index, Count>&, const Projection&, int, float*);
RVQA_EACH_ROWS(RVQA_INSTANTIATE)

}  // namespace rvqa

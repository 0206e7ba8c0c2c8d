// Blocks of cells: their entries are sorted by gene (a counting sort, so the file's order of genes costs nothing), then
// each row of W is read once for the block and added to the hidden units of the cells that have the gene, 64 hidden
// units at a time so that those of the block stay in the first cache.

#include "cpu/project.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/exact.h"
#include "cpu/isa.h"
#include "cpu/pool.h"

namespace rvqa {
namespace {

constexpr int64_t CELLS = 128;               // of a block: their tile of hidden units fills 32 KB
constexpr int64_t ENTRIES = int64_t(1) << 22;  // of a block, unless one row has more
constexpr int TABLE = 64;                    // counts below this share one log1p a cell

// Correctly rounded sum: plain while all counts are whole and their sum is exact, an expansion otherwise.
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
    for (int64_t i = 0; i < n; ++i) exact.add(double(data[i]));
    return exact.rounded();
}

// Scratch of one thread.
struct Scratch {
    std::vector<uint32_t> key;      // entries of the block in the order of the file
    std::vector<float> value;
    std::vector<Entry> sorted;     // entries of the block by gene
    std::vector<uint32_t> place;   // [G + 1]
    std::array<double, TABLE> small; // 0, 1, 2, ...
    std::vector<double> rare_count;
    std::vector<float> rare_value;
    std::vector<uint32_t> rare_at;
    std::vector<float> hidden;     // [CELLS, TILE]
    std::vector<uint8_t> repeated; // [CELLS]: rows where a gene is stored more than once
    ExactSum exact;

    Scratch() {
        for (int i = 0; i < TABLE; ++i) small[i] = i;
    }
};

// Row n by itself, entries of the same gene added up first: the definition as it stands.
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
        for (int64_t h = 0; h < p.H; ++h) hidden[h] += value * p.W[column * p.H + h];
    }
}

template <class Count>
bool is_count(Count count) {
    if constexpr (std::is_unsigned_v<Count>)
        return true;
    else if constexpr (std::is_same_v<Count, double>)
        return (count >= 0x1p-149 && count <= 0x1p53) || count == 0;
    else
        return count >= 0 && double(count) <= 0x1p53;
}

// Appends the entries of row n (cell `cell` of the block) that are on the axis: key and value; counts genes in place.
// Sets `invalid` for a column that does not exist or a count that is none.
template <class Index, class Count>
int64_t prepare_row(const Sparse<Index, Count>& rows, const Projection& p, int64_t n, uint32_t cell, int64_t at,
                    double scale, const Kernels& isa, Scratch& own, bool& invalid) {
    const int64_t begin = rows.indptr[n], stored = rows.indptr[n + 1] - begin;
    const Index* indices = rows.indices + begin;
    const Count* data = rows.data + begin;
    uint32_t *key = own.key.data() + at, *place = own.place.data();
    float* value = own.value.data() + at;
    if (stored > 0 && p.columns == 0) invalid = true;
    if (stored == 0 || p.columns == 0) return at;

    // log1p once for each small count; what is no such count waits for its own.
    alignas(64) float logs[TABLE] = {};
    const bool table = stored >= TABLE;
    if (table) isa.log1p_scaled(own.small.data(), TABLE, scale, logs);
    const double below = table ? TABLE : 0;
    int64_t kept = 0, rare = 0;
    bool wrong = false;
    for (int64_t e = 0; e < stored; ++e) {  // no branch: which genes are on the axis has no pattern
        const uint64_t given = uint64_t(int64_t(indices[e])), safe = std::min(given, uint64_t(p.columns - 1));
        const Count count = data[e];
        wrong |= (given != safe) | !is_count(count);
        const int64_t column = p.column_map ? p.column_map[safe] : int64_t(safe);
        const bool keep = (column >= 0) & (count > 0);
        const int whole = (count >= 0) & (double(count) < below) ? int(count) : 0;  // 0 for NaN
        key[kept] = uint32_t(column) << 8 | cell;
        value[kept] = logs[whole];
        own.rare_at[rare] = uint32_t(kept);
        own.rare_count[rare] = double(count);
        rare += keep & (Count(whole) != count);
        ++place[keep ? column + 1 : 0];
        kept += keep;
    }
    invalid |= wrong | (kept > 0 && !(scale < std::numeric_limits<double>::infinity()));
    isa.log1p_scaled(own.rare_count.data(), rare, scale, own.rare_value.data());
    for (int64_t i = 0; i < rare; ++i) value[own.rare_at[i]] = own.rare_value[i];
    return at + kept;
}

// Rows [first, last), at most CELLS; false where they are not valid.
template <class Index, class Count>
bool project_block(const Sparse<Index, Count>& rows, const Projection& p, int64_t first, int64_t last,
                   const Kernels& isa, Scratch& own, float* hidden) {
    const int64_t stored = rows.indptr[last] - rows.indptr[first], cells = last - first;
    int64_t longest = 0;
    for (int64_t n = first; n < last; ++n) longest = std::max(longest, rows.indptr[n + 1] - rows.indptr[n]);
    const auto grow = [](auto& vector, int64_t size) {
        if (int64_t(vector.size()) < size) vector.resize(size);
    };
    grow(own.key, stored + 1), grow(own.value, stored + 1), grow(own.sorted, stored + AHEAD + 1);
    grow(own.rare_at, longest + 1), grow(own.rare_count, longest + 1);
    grow(own.rare_value, longest + 1);
    own.place.assign(p.G + 1, 0);
    own.repeated.assign(CELLS, 0);

    double scale[CELLS];
    bool invalid = false;
    int64_t n_entries = 0;
    for (int64_t i = 0; i < cells; ++i) {
        const int64_t n = first + i, begin = rows.indptr[n];
        const double size = p.library ? p.library[n] : total(rows.data + begin, rows.indptr[n + 1] - begin, isa, own.exact);
        scale[i] = p.target_sum / size;
        n_entries = prepare_row(rows, p, n, uint32_t(i), n_entries, scale[i], isa, own, invalid);
        invalid |= p.library && !is_count(size);
    }
    if (invalid) return false;

    // place[g + 1] held the entries of gene g; now place[g] is where its first one goes.
    uint32_t* place = own.place.data();
    uint32_t start = 0;
    for (int64_t g = 0; g < p.G; ++g) {
        place[g] = start;
        start += place[g + 1];
    }
    Entry* sorted = own.sorted.data();
    for (int64_t e = 0; e < n_entries; ++e) sorted[place[own.key[e] >> 8]++] = {own.key[e], own.value[e]};
    for (int64_t e = n_entries; e < n_entries + AHEAD; ++e) sorted[e] = n_entries ? sorted[n_entries - 1] : Entry{};
    bool any = false;
    for (int64_t e = 1; e < n_entries; ++e) any |= sorted[e].key == sorted[e - 1].key;
    if (any)
        for (int64_t e = 1; e < n_entries; ++e)
            if (sorted[e].key == sorted[e - 1].key) own.repeated[sorted[e].cell()] = 1;

    grow(own.hidden, CELLS * TILE + 16);
    float* tile = own.hidden.data();
    tile += (64 - reinterpret_cast<uintptr_t>(tile) % 64) % 64 / sizeof(float);
    for (int64_t h = 0; h < p.H; h += TILE) {
        const int64_t width = std::min(TILE, p.H - h);
        for (int64_t i = 0; i < cells; ++i) std::memcpy(tile + i * TILE, p.bias + h, sizeof(float) * width);
        isa.project_tile(sorted, n_entries, p.W + h, p.H, width, tile);
        for (int64_t i = 0; i < cells; ++i)
            std::memcpy(hidden + (first + i) * p.H + h, tile + i * TILE, sizeof(float) * width);
    }
    for (int64_t i = 0; i < cells; ++i)
        if (own.repeated[i])
            project_row(rows, p, first + i, scale[i], isa, own.exact, hidden + (first + i) * p.H);
    return true;
}

}  // namespace

template <class Index, class Count>
bool csr_project(const Sparse<Index, Count>& rows, const Projection& p, int threads, float* hidden) {
    const Kernels& isa = kernels();
    for (int64_t n = 0; n <= rows.N; ++n)
        if (rows.indptr[n] < (n ? rows.indptr[n - 1] : 0) || rows.indptr[n] > rows.E) return false;
    if (p.column_map)
        for (int64_t i = 0; i < p.columns; ++i)
            if (p.column_map[i] < -1 || p.column_map[i] >= p.G) return false;
    std::atomic<bool> valid{true};
    // Parts of one block each, but several for a thread that has them all.
    const int64_t grain = std::max<int64_t>(1, std::min<int64_t>(CELLS, (rows.N + threads - 1) / threads));
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
#define RVQA_INSTANTIATE_COUNTS(Index) \
    RVQA_INSTANTIATE(Index, float)     \
    RVQA_INSTANTIATE(Index, double)    \
    RVQA_INSTANTIATE(Index, int32_t)   \
    RVQA_INSTANTIATE(Index, uint32_t)  \
    RVQA_INSTANTIATE(Index, uint16_t)  \
    RVQA_INSTANTIATE(Index, uint8_t)
RVQA_INSTANTIATE_COUNTS(int32_t)
RVQA_INSTANTIATE_COUNTS(int64_t)

}  // namespace rvqa

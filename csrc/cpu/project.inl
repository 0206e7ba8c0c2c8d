// The hot loops of project.cpp for one instruction set; a part of kernels.inl.

// Sum of counts if it is surely exact: all are whole and few enough for float32 in every lane. Else returns false.
bool whole_sum(const float* counts, int64_t n, double* sum) {
    const Vec magic = all(0x1p23f);  // (count + 2^23) - 2^23 is count only if count is whole
    Vec part = all(0.0f), high = all(0.0f), low = all(0.0f);
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const Vec count = load(counts + i), lost = ((count + magic) - magic) - count;
        part = part + count;
        high = most(high, lost);
        low = least(low, lost);
    }
    float parts[W], highs[W], lows[W];
    store(parts, part);
    store(highs, high);
    store(lows, low);
    bool exact = true;
    double total = 0;
    for (int j = 0; j < W; ++j) {
        exact &= (parts[j] < 0x1p24f) & (highs[j] == 0) & (lows[j] == 0);
        total += double(parts[j]);
    }
    for (; i < n; ++i) {
        exact &= (counts[i] + 0x1p23f) - 0x1p23f == counts[i];
        total += double(counts[i]);
    }
    *sum = total;
    return exact;
}

// log(1 + count * scale) by the operations of `log1p` in kernels/reference.py, in their order. There are no branches,
// so that the compiler can vectorise it.
void log1p_scaled(const double* counts, int64_t n, double scale, float* out) {
    constexpr double LN2_HI = 0x1.62e42feep-1;  // leading 32 bits of ln 2: exact times any exponent
    constexpr double LN2_LO = 0x1.a39ef35793c76p-33;
    for (int64_t i = 0; i < n; ++i) {
        const double y = counts[i] * scale, w = 1.0 + y;
        uint64_t bits;
        __builtin_memcpy(&bits, &w, 8);
        // w = 2^exponent * mantissa with mantissa in [sqrt(1/2), sqrt(2))
        constexpr uint64_t HALF_ROOT = 0x3FE6A09E667F3BCD, FRACTION = 0x000FFFFFFFFFFFFF;
        const uint64_t shifted = bits - HALF_ROOT;  // wraps for NaN, whose row is rejected
        const int64_t exponent = int64_t(shifted) >> 52;
        const uint64_t moved = (shifted & FRACTION) + HALF_ROOT;
        double mantissa;
        __builtin_memcpy(&mantissa, &moved, 8);
        const double k = double(int32_t(exponent));
        const double lost = (y < 1.0 ? y - (w - 1.0) : 1.0 - (w - y)) / w;
        const double f = exponent ? mantissa - 1.0 : y, correction = exponent ? lost : 0.0;
        const double s = f / (2.0 + f), z = s * s;
        double poly = 2.0 / 23.0;
        for (int j = 10; j >= 1; --j) poly = poly * z + 2.0 / double(2 * j + 1);
        const double rest = s * (f - z * poly) - (k * LN2_LO + correction);
        out[i] = float(k * LN2_HI + (f - rest));
    }
}

#if defined(RVQA_AVX512)

// Sixteen values: which are valid counts, which are above 0, and which are whole and below 64.
struct Counts {
    __m512i whole;
    __mmask16 valid, positive, small;
};

inline Counts counts_of(__m512 v) {
    const __m512i whole = _mm512_cvttps_epi32(v);
    const __mmask16 valid = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GE_OQ) &
                            _mm512_cmp_ps_mask(v, _mm512_set1_ps(0x1p53f), _CMP_LE_OQ);
    return {whole, valid, _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ),
            __mmask16(valid & _mm512_cmp_ps_mask(v, _mm512_set1_ps(64.0f), _CMP_LT_OQ) &
                      _mm512_cmp_ps_mask(v, _mm512_cvtepi32_ps(whole), _CMP_EQ_OQ))};
}

inline Counts counts_of(__m512d low, __m512d high) {
    __mmask8 valid[2], positive[2], small[2];
    __m256i whole[2];
    for (int i = 0; i < 2; ++i) {
        const __m512d v = i ? high : low;
        whole[i] = _mm512_cvttpd_epi32(v);
        valid[i] = (_mm512_cmp_pd_mask(v, _mm512_set1_pd(0x1p-149), _CMP_GE_OQ) &
                    _mm512_cmp_pd_mask(v, _mm512_set1_pd(0x1p53), _CMP_LE_OQ)) |
                   _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_EQ_OQ);
        positive[i] = _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_GT_OQ);
        small[i] = valid[i] & _mm512_cmp_pd_mask(v, _mm512_set1_pd(64.0), _CMP_LT_OQ) &
                   _mm512_cmp_pd_mask(v, _mm512_cvtepi32_pd(whole[i]), _CMP_EQ_OQ);
    }
    const auto both = [](__mmask8 a, __mmask8 b) { return __mmask16(a | b << 8); };
    return {_mm512_inserti64x4(_mm512_castsi256_si512(whole[0]), whole[1], 1), both(valid[0], valid[1]),
            both(positive[0], positive[1]), both(small[0], small[1])};
}

inline Counts counts_of(__m512i v, __mmask16 valid) {
    return {v, valid, _mm512_test_epi32_mask(v, v), _mm512_cmplt_epu32_mask(v, _mm512_set1_epi32(64))};
}

inline Counts counts_at(const float* p, __mmask16 m) { return counts_of(_mm512_maskz_loadu_ps(m, p)); }
inline Counts counts_at(const double* p, __mmask16 m) {
    return counts_of(_mm512_maskz_loadu_pd(__mmask8(m), p), _mm512_maskz_loadu_pd(__mmask8(m >> 8), p + 8));
}
inline Counts counts_at(const int32_t* p, __mmask16 m) {
    const __m512i v = _mm512_maskz_loadu_epi32(m, p);
    return counts_of(v, _mm512_cmpge_epi32_mask(v, _mm512_setzero_si512()));
}
inline Counts counts_at(const uint32_t* p, __mmask16 m) { return counts_of(_mm512_maskz_loadu_epi32(m, p), 0xFFFF); }
inline Counts counts_at(const uint16_t* p, __mmask16 m) {
    return counts_of(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 0xFFFF);
}
inline Counts counts_at(const uint8_t* p, __mmask16 m) {
    return counts_of(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, p)), 0xFFFF);
}

// Sixteen columns, and which of them exist.
struct Columns {
    __m512i column;
    __mmask16 valid;
};

inline Columns columns_at(const int32_t* p, __mmask16 m, int64_t columns) {
    const __m512i v = _mm512_maskz_loadu_epi32(m, p);
    return {v, _mm512_cmplt_epu32_mask(v, _mm512_set1_epi32(int32_t(columns)))};
}
inline Columns columns_at(const int64_t* p, __mmask16 m, int64_t columns) {
    const __m512i low = _mm512_maskz_loadu_epi64(__mmask8(m), p), most = _mm512_set1_epi64(columns),
                  high = _mm512_maskz_loadu_epi64(__mmask8(m >> 8), p + 8);
    return {_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)), _mm512_cvtepi64_epi32(high), 1),
            __mmask16(_mm512_cmplt_epu64_mask(low, most) | _mm512_cmplt_epu64_mask(high, most) << 8)};
}

template <class Index, class Count>
Placed place(const void* given_indices, const void* given_data, int64_t stored, const int32_t* column_map,
             int64_t columns, const float* logs, float* dense, int32_t* rare_column, int64_t* rare_entry) {
    const Index* indices = static_cast<const Index*>(given_indices);
    const Count* data = static_cast<const Count*>(given_data);
    if (columns == 0) return {0, 0, stored == 0};
    __m512 table[4] = {};
    for (int i = 0; i < 4 && logs; ++i) table[i] = _mm512_loadu_ps(logs + 16 * i);
    const __mmask16 tabled = logs ? 0xFFFF : 0;
    Placed placed = {0, 0, true};
    for (int64_t e = 0; e < stored; e += 16) {
        const __mmask16 here = stored - e >= 16 ? 0xFFFF : __mmask16((1u << (stored - e)) - 1);
        const Columns at = columns_at(indices + e, here, columns);
        const Counts count = counts_at(data + e, here);
        placed.valid &= !(here & ~(at.valid & count.valid));
        const __mmask16 inside = here & at.valid;
        const __m512i column = column_map ? _mm512_mask_i32gather_epi32(_mm512_set1_epi32(-1), inside, at.column, column_map, 4)
                                          : at.column;
        const __mmask16 keep = inside & count.positive & _mm512_cmpge_epi32_mask(column, _mm512_setzero_si512());
        const __mmask16 small = keep & count.small & tabled, rare = keep & ~small;
        const __m512 low = _mm512_permutex2var_ps(table[0], count.whole, table[1]),
                     high = _mm512_permutex2var_ps(table[2], count.whole, table[3]);
        const __m512 value = _mm512_mask_blend_ps(_mm512_test_epi32_mask(count.whole, _mm512_set1_epi32(32)), low, high);
        _mm512_mask_i32scatter_ps(dense, small, column, value, 4);
        placed.kept += __builtin_popcount(keep);
        if (rare) {
            _mm512_storeu_si512(rare_column + placed.rare, _mm512_maskz_compress_epi32(rare, column));
            for (unsigned rest = rare; rest; rest &= rest - 1) rare_entry[placed.rare++] = e + __builtin_ctz(rest);
        }
    }
    return placed;
}

#else

inline bool is_count(float count) { return count >= 0 && count <= 0x1p53f; }
inline bool is_count(double count) { return (count >= 0x1p-149 && count <= 0x1p53) || count == 0; }
inline bool is_count(int32_t count) { return count >= 0; }
inline bool is_count(uint32_t) { return true; }

template <class Index, class Count>
Placed place(const void* given_indices, const void* given_data, int64_t stored, const int32_t* column_map,
             int64_t columns, const float* logs, float* dense, int32_t* rare_column, int64_t* rare_entry) {
    const Index* indices = static_cast<const Index*>(given_indices);
    const Count* data = static_cast<const Count*>(given_data);
    if (columns == 0) return {0, 0, stored == 0};
    const Count below = logs ? 64 : 0;
    const float none = 0;
    const float* table = logs ? logs : &none;
    Placed placed = {0, 0, true};
    for (int64_t e = 0; e < stored; ++e) {  // no branch, because it could not be predicted which genes are on the axis
        const uint64_t given = uint64_t(int64_t(indices[e])), safe = given < uint64_t(columns) ? given : 0;
        const Count count = data[e];
        placed.valid &= (given == safe) & is_count(count);
        const int32_t column = column_map ? column_map[safe] : int32_t(safe);
        const bool keep = (column >= 0) & (count > 0);
        const int32_t whole = (count >= 0) & (count < below) ? int32_t(count) : 0;  // 0 for NaN
        const bool rare = keep & (Count(whole) != count);
        if (column >= 0 && !rare) dense[column] = table[whole];
        rare_column[placed.rare] = column;
        rare_entry[placed.rare] = e;
        placed.rare += rare;
        placed.kept += keep;
    }
    return placed;
}

#endif

constexpr Place PLACE[2][6] = {
    {place<int32_t, float>, place<int32_t, double>, place<int32_t, int32_t>, place<int32_t, uint32_t>,
     place<int32_t, uint16_t>, place<int32_t, uint8_t>},
    {place<int64_t, float>, place<int64_t, double>, place<int64_t, int32_t>, place<int64_t, uint32_t>,
     place<int64_t, uint16_t>, place<int64_t, uint8_t>}};

int64_t collect(float* dense, int64_t words, uint64_t* masks, int64_t stride, float* values) {
    const Vec zero = all(0.0f);
    int64_t n = 0;
    for (int64_t word = 0; word < words; ++word, dense += GENES) {
        uint64_t mask = 0;
        for (int i = 0; i < GENES; i += W) {
            const Vec value = load(dense + i);
            const uint64_t here = unequal(value, zero);
            mask |= here << i;
#if defined(RVQA_AVX512)
            _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(__mmask16(here), value.v));
            n += __builtin_popcountll(here);
#endif
        }
        masks[word * stride] = mask;
        if (mask == 0) continue;
#if !defined(RVQA_AVX512)
        for (uint64_t rest = mask; rest; rest &= rest - 1) values[n++] = dense[__builtin_ctzll(rest)];
#endif
        for (int i = 0; i < GENES; i += W) store(dense + i, zero);
    }
    return n;
}

// Computes VECTORS * W hidden units of all cells. Those of a cell stay in registers over its genes of the word, and the
// word's part of w stays in the nearest caches over all cells.
template <int VECTORS>
inline void project_part(const uint64_t* masks, const float* const* values, int64_t cells, const float* w, int64_t H,
                         float* hidden) {
    for (int64_t i = 0; i < cells; ++i, hidden += H) {
        uint64_t mask = masks[i];
        if (mask == 0) continue;
        const float* value = values[i];
        Vec sum[VECTORS];
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; ++j) sum[j] = load(hidden + j * W);
        do {
            const float* row = w + int64_t(__builtin_ctzll(mask)) * H;
            const Vec x = all(*value++);
#pragma GCC unroll 16
            for (int j = 0; j < VECTORS; ++j) sum[j] = fused(x, load(row + j * W), sum[j]);
            mask &= mask - 1;
        } while (mask);
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; ++j) store(hidden + j * W, sum[j]);
    }
}

void project_word(const uint64_t* masks, const float** values, int64_t cells, const float* w, int64_t H,
                  float* hidden) {
    constexpr int VECTORS = W == 16 ? 16 : 8;
    int64_t h = 0;
    for (; h + VECTORS * W <= H; h += VECTORS * W) project_part<VECTORS>(masks, values, cells, w + h, H, hidden + h);
    for (; h + W <= H; h += W) project_part<1>(masks, values, cells, w + h, H, hidden + h);
    for (int64_t i = 0; i < cells; ++i) {
        if (h < H) {
            const float* value = values[i];
            for (uint64_t mask = masks[i]; mask; mask &= mask - 1, ++value)
                for (int64_t j = h; j < H; ++j) {
                    float* sum = hidden + i * H + j;
                    *sum = __builtin_fmaf(*value, w[int64_t(__builtin_ctzll(mask)) * H + j], *sum);
                }
        }
        values[i] += __builtin_popcountll(masks[i]);
    }
}

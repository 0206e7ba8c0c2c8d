// The hot loops for one instruction set. avx512.cpp, avx2.cpp and portable.cpp each include it after simd.h, in their
// own namespace. It uses nothing of the standard library: the linker keeps one instance of a template for all files,
// which could be the one compiled for AVX-512.

constexpr int W = Vec::LANES;
constexpr int GROUP = W == 16 ? ROWS : 6;  // rows whose sums stay in registers, two vectors each
constexpr int SLOTS = 16;                  // ROWS, rounded up to whole vectors

// s[i, PANEL] = <r_i, w> + b for the ROWS rows of a tile and one panel of codewords.
inline void score(const float* r, int64_t stride, const float* w, const float* b, int64_t D, float* s,
                  int64_t s_stride) {
    for (int column = 0; column < PANEL; column += 2 * W) {
        const Vec b0 = load(b + column), b1 = load(b + column + W);
        for (int row = 0; row < ROWS; row += GROUP) {
            Vec sum[GROUP][2];
#pragma GCC unroll 12
            for (int i = 0; i < GROUP; ++i) sum[i][0] = sum[i][1] = all(0.0f);
            const float* x = r + row * stride;
            const float* at = w + column;
            for (int64_t d = 0; d < D; ++d, at += PANEL) {
                const Vec w0 = load(at), w1 = load(at + W);
#pragma GCC unroll 12
                for (int i = 0; i < GROUP; ++i) {
                    const Vec x_i = all(x[i * stride + d]);
                    sum[i][0] = fma(x_i, w0, sum[i][0]);
                    sum[i][1] = fma(x_i, w1, sum[i][1]);
                }
            }
#pragma GCC unroll 12
            for (int i = 0; i < GROUP; ++i) {
                store(s + (row + i) * s_stride + column, sum[i][0] + b0);
                store(s + (row + i) * s_stride + column + W, sum[i][1] + b1);
            }
        }
    }
}

// Least lane of each of ROWS vectors, at out[slot(row)].
#if defined(RVQA_AVX512)

constexpr int slot(int row) { return row % 4 * 4 + row / 4; }

inline void lane_minima(const Vec* v, float* out) {
    __m512 quarter[3];
    for (int i = 0; i < 3; ++i) {  // rows 4i .. 4i + 3, one in each quarter
        const __m512 a = v[4 * i].v, b = v[4 * i + 1].v, c = v[4 * i + 2].v, d = v[4 * i + 3].v;
        const __m512 ab = _mm512_min_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        const __m512 cd = _mm512_min_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
        quarter[i] = _mm512_min_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    }
    const __m512 xy = _mm512_min_ps(_mm512_unpacklo_ps(quarter[0], quarter[1]), _mm512_unpackhi_ps(quarter[0], quarter[1]));
    const __m512 zz = _mm512_min_ps(_mm512_unpacklo_ps(quarter[2], quarter[2]), _mm512_unpackhi_ps(quarter[2], quarter[2]));
    const __m512d xy2 = _mm512_castps_pd(xy), zz2 = _mm512_castps_pd(zz);
    const __m512d low = _mm512_unpacklo_pd(xy2, zz2), high = _mm512_unpackhi_pd(xy2, zz2);
    _mm512_storeu_ps(out, _mm512_min_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high)));
}

#else

constexpr int slot(int row) { return row; }

inline void lane_minima(const Vec* v, float* out) {
    for (int row = 0; row < ROWS; ++row) {
        float lane[W];
        store(lane, v[row]);
        float low = lane[0];
        for (int i = 1; i < W; ++i) low = lane[i] < low ? lane[i] : low;
        out[row] = low;
    }
}

#endif

// D is a multiple of PAD.
float square(const float* r, int64_t D) {
    Vec sum[2] = {all(0.0f), all(0.0f)};
    int64_t d = 0;
    for (; d + 2 * W <= D; d += 2 * W)
        for (int i = 0; i < 2; ++i) {
            const Vec x = load(r + d + i * W);
            sum[i] = fma(x, x, sum[i]);
        }
    for (; d < D; d += W) {
        const Vec x = load(r + d);
        sum[0] = fma(x, x, sum[0]);
    }
    float lane[W], total = 0;
    store(lane, sum[0] + sum[1]);
    for (int i = 0; i < W; ++i) total += lane[i];
    return total;
}

void encode_tile(const Tables& t, float* r, int64_t stride, const float* squares, int rows, int64_t levels, float* s,
                 Judge& judge, uint8_t* codes, const Soon& soon) {
    const int64_t width = t.width();
    int64_t fetched = 0;
    alignas(64) float square_of[SLOTS] = {}, rho[SLOTS] = {}, low[SLOTS] = {}, limit[SLOTS];
    for (int i = 0; i < ROWS; ++i) square_of[slot(i)] = squares[i] * t.square_growth + TINY;
    for (int64_t m = 0; m < levels; ++m) {
        for (const int64_t share = soon.rows * (m + 1) / levels; fetched < share; ++fetched)
            for (int64_t i = 0; i < soon.bytes; i += 64) __builtin_prefetch(soon.data + fetched * soon.stride + i, 0, 2);
        for (int64_t p = 0; p < t.panels; ++p)
            score(r, stride, t.w + (m * t.panels + p) * t.D * PANEL, t.b + m * width + p * PANEL, t.D, s + p * PANEL,
                  width);
        Vec lowest[ROWS];
        for (int i = 0; i < ROWS; ++i) {
            const float* row = s + i * width;
            Vec v = load(row);
            for (int64_t k = W; k < width; k += W) v = least(v, load(row + k));
            lowest[i] = v;
        }
        lane_minima(lowest, low);

        const Bound& bound = t.bound[m];
        for (int i = 0; i < SLOTS; i += W) {
            const Vec nu = root(load(square_of + i)) * all(1 + 0x1p-20f), at = load(low + i);
            const Vec tau = all(bound.per_rho) * load(rho + i) + (all(bound.per_nu) * nu + all(bound.constant));
            const Vec top = at + tau;
            store(limit + i, where_below(all(bound.nu_max), nu, all(INFINITY), top));
            // The next level needs this bound: |r - c|^2 <= |r|^2 + s + E, and one rounding of the new residual.
            const Vec next = (load(square_of + i) + top + tau) * all(1 + 0x1p-20f) + all(TINY);
            store(square_of + i, next);
            store(rho + i, load(rho + i) + all(0x1.01p-24f) * (root(next) * all(1 + 0x1p-20f)));
        }

        Mask candidates[ROWS];
        if (width == PANEL) {
            for (int i = 0; i < ROWS; ++i) {
                const Vec at = all(limit[slot(i)]);
                Mask mask = 0;
                for (int k = 0; k < PANEL; k += W) mask |= not_above(load(s + i * PANEL + k), at) << k;
                candidates[i] = mask;
            }
        }
        for (int i = 0; i < rows; ++i) {
            int64_t code = 0, count = 0;
            if (width == PANEL) {
                code = __builtin_ctz(candidates[i] | Mask(1) << (t.K - 1));  // below K whatever the tables hold
                count = (candidates[i] & (candidates[i] - 1)) ? 2 : 1;
            } else {
                const Vec at = all(limit[slot(i)]);
                for (int64_t k = width - W; k >= 0; k -= W) {
                    const Mask mask = not_above(load(s + i * width + k), at);
                    count += __builtin_popcount(mask);
                    if (mask) code = k + __builtin_ctz(mask);
                }
                if (code >= t.K) code = t.K - 1;
            }
            if (count > 1) code = judge.settle(i, m, s + i * width, limit[slot(i)]);
            codes[i * levels + m] = uint8_t(code);
            const float* c = t.codeword(m, code);
            float* row = r + i * stride;
            if (m + 1 < levels)
                for (int64_t d = 0; d < t.padded; d += W) store(row + d, load(row + d) - load(c + d));
        }
    }
}

void score_panel(const Tables& t, const float* r, int64_t stride, int64_t p, float* s) {
    score(r, stride, t.w + p * t.D * PANEL, t.b + p * PANEL, t.D, s, PANEL);
}

void nearest_tiles(const Tables& t, const float* r, int64_t stride, int64_t tiles, float* scratch, float* least_of,
                   int64_t* at, float* second_of) {
    // For every row and lane of a panel: the least score so far, the panel it came from, and the second least.
    const int64_t n = tiles * ROWS * PANEL;
    float *first = scratch, *panel_of = scratch + n, *second = scratch + 2 * n;
    for (int64_t i = 0; i < n; ++i) first[i] = second[i] = INFINITY, panel_of[i] = 0;
    float s[ROWS * PANEL];
    for (int64_t p = 0; p < t.panels; ++p)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            score(r + tile * ROWS * stride, stride, t.w + p * t.D * PANEL, t.b + p * PANEL, t.D, s, PANEL);
            const int64_t base = tile * ROWS * PANEL;
            const Vec here = all(float(p));
            for (int i = 0; i < ROWS * PANEL; i += W) {
                const Vec now = load(s + i), low = load(first + base + i);
                store(second + base + i, least(load(second + base + i), most(low, now)));
                store(panel_of + base + i, where_below(now, low, here, load(panel_of + base + i)));
                store(first + base + i, least(now, low));
            }
        }
    for (int64_t row = 0; row < tiles * ROWS; ++row) {
        const int64_t base = row * PANEL;
        int best = 0;
        for (int i = 1; i < PANEL; ++i)
            if (first[base + i] < first[base + best]) best = i;
        float next = INFINITY;
        for (int i = 0; i < PANEL; ++i) {
            const float value = i == best ? second[base + i] : first[base + i];
            if (value < next) next = value;
        }
        least_of[row] = first[base + best];
        at[row] = int64_t(panel_of[base + best]) * PANEL + best;
        second_of[row] = next;
    }
}

float distance(const float* x, const float* c, int64_t padded) {
    double sum[8] = {};
    for (int64_t d = 0; d < padded; d += 8)
        for (int i = 0; i < 8; ++i) {
            const double gap = double(x[d + i]) - double(c[d + i]);
            sum[i] += gap * gap;
        }
    return float(((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7])));
}

void decode(const uint8_t* codes, int64_t code_stride, const float* codebooks, int64_t N, int64_t levels, int64_t K,
            int64_t D, float* out) {
    const int64_t whole = D / W * W;
    const bool aligned = reinterpret_cast<uintptr_t>(out) % (W * sizeof(float)) == 0 && D % W == 0;
    for (int64_t n = 0; n < N; ++n, out += D) {
        const uint8_t* code = codes + n * code_stride;
        int64_t d = 0;
        for (; d < whole; d += W) {
            Vec sum = load(codebooks + code[0] * D + d);
            for (int64_t m = 1; m < levels; ++m) sum = sum + load(codebooks + (m * K + code[m]) * D + d);
            if (aligned)
                stream(out + d, sum);
            else
                store(out + d, sum);
        }
        for (; d < D; ++d) {
            float sum = codebooks[code[0] * D + d];
            for (int64_t m = 1; m < levels; ++m) sum += codebooks[(m * K + code[m]) * D + d];
            out[d] = sum;
        }
    }
    fence();
}

void fill(char* at, int64_t bytes, int64_t width, uint32_t value, bool streamed) {
    constexpr int64_t VECTOR = W * sizeof(float);
    char* const end = at + bytes;
    const auto one = [&] {
        width == 4 ? __builtin_memcpy(at, &value, 4) : __builtin_memcpy(at, &value, 2);
        at += width;
    };
    float bits;
    __builtin_memcpy(&bits, &value, 4);
    const Vec v = all(bits);
    while (at < end && reinterpret_cast<uintptr_t>(at) % VECTOR) one();
    if (streamed) {
        for (; end - at >= VECTOR; at += VECTOR) stream(reinterpret_cast<float*>(at), v);
        fence();
    } else {
#if defined(__x86_64__) && defined(__GNUC__)
        // This writes whole cache lines without reading them first, as vector stores do: up to a third faster.
        int64_t left = (end - at) / 4;
        asm volatile("rep stosl" : "+D"(at), "+c"(left) : "a"(value) : "memory");
#else
        for (; end - at >= VECTOR; at += VECTOR) store(reinterpret_cast<float*>(at), v);
#endif
    }
    while (at < end) one();
}

#include "cpu/project.inl"

// ---- only benches call these, to measure what the machine can do at best -------------------------------------------

// Multiply-adds in registers, fused where the instruction exists: 2 * 16 * W * rounds operations.
float multiply_add(int64_t rounds) {
    Vec sum[16];
    for (int i = 0; i < 16; ++i) sum[i] = all(float(i));
    const Vec x = all(0.999f);
    for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) sum[i] = fma(sum[i], x, x);
    float lane[W], total = 0;
    for (int i = 0; i < 16; ++i) {
        store(lane, sum[i]);
        total += lane[0];
    }
    return total;
}

// out[n, H] = sum of values * rows of w, cell by cell as the entries stand, sums in registers, 16 vectors at a time.
template <int VECTORS>
inline void gather(const int64_t* indptr, const int32_t* indices, const float* values, const float* w, int64_t N,
                   int64_t H, float* out) {
    for (int64_t n = 0; n < N; ++n)
        for (int64_t h = 0; h < H; h += VECTORS * W) {
            Vec sum[VECTORS];
#pragma GCC unroll 16
            for (int j = 0; j < VECTORS; ++j) sum[j] = all(0.0f);
            for (int64_t e = indptr[n]; e < indptr[n + 1]; ++e) {
                const float* row = w + int64_t(indices[e]) * H + h;
                const Vec value = all(values[e]);
#pragma GCC unroll 16
                for (int j = 0; j < VECTORS; ++j) sum[j] = fma(value, load(row + j * W), sum[j]);
            }
#pragma GCC unroll 16
            for (int j = 0; j < VECTORS; ++j) store(out + n * H + h + j * W, sum[j]);
        }
}

void gather_multiply_add(const int64_t* indptr, const int32_t* indices, const float* values, const float* w, int64_t N,
                         int64_t H, float* out) {
    constexpr int MOST = W == 16 ? 16 : 8;
    if (H % (MOST * W) == 0) return gather<MOST>(indptr, indices, values, w, N, H, out);
    gather<1>(indptr, indices, values, w, N, H, out);
}

constexpr Kernels kernels_called(const char* name) {
    return {name,      encode_tile,  square,       score_panel, nearest_tiles, distance,           decode,
            fill, whole_sum, log1p_scaled, PLACE,       collect,       project_word,       W,
            multiply_add, gather_multiply_add};
}

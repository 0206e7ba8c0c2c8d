// One vector type, three instruction sets. A source file defines RVQA_AVX512, RVQA_AVX2 or nothing (any CPU: the
// compiler's 16-byte vectors), sets the compiler's target, and includes this file inside its own namespace.
//
// fma() may or may not fuse, so no result with promised bits uses it. fused() rounds once on every CPU.

using Mask = uint32_t;

#if defined(RVQA_AVX512)

struct Vec {
    static constexpr int LANES = 16;
    __m512 v;
};
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
inline void fence() { _mm_sfence(); }
inline Vec all(float a) { return {_mm512_set1_ps(a)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }
inline Vec least(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec most(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// Bit i: not (a[i] > b[i]), so set for NaN.
inline Mask not_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NGT_UQ); }
inline Mask unequal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ); }
// a where a[i] < b[i] picks from, b elsewhere.
inline Vec where_below(Vec a, Vec b, Vec from, Vec otherwise) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), otherwise.v, from.v)};
}

#elif defined(RVQA_AVX2)

struct Vec {
    static constexpr int LANES = 8;
    __m256 v;
};
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
inline void fence() { _mm_sfence(); }
inline Vec all(float a) { return {_mm256_set1_ps(a)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fused(Vec a, Vec b, Vec c) { return fma(a, b, c); }
inline Vec least(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec most(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec root(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Mask not_above(Vec a, Vec b) { return Mask(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NGT_UQ))); }
inline Mask unequal(Vec a, Vec b) { return Mask(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ))); }
inline Vec where_below(Vec a, Vec b, Vec from, Vec otherwise) {
    return {_mm256_blendv_ps(otherwise.v, from.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}

#else

struct Vec {
    static constexpr int LANES = 4;
    typedef float Four __attribute__((vector_size(16)));
    Four v;
};
inline Vec load(const float* p) {
    Vec a;
    __builtin_memcpy(&a.v, p, 16);
    return a;
}
inline void store(float* p, Vec a) { __builtin_memcpy(p, &a.v, 16); }
inline void stream(float* p, Vec a) { store(p, a); }
inline void fence() {}
inline Vec all(float a) { return {Vec::Four{a, a, a, a}}; }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// This is an instruction on Arm. An x86 without AVX2 (older than 2013) calls the C library: correct, but slow.
inline Vec fused(Vec a, Vec b, Vec c) {
    for (int i = 0; i < 4; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
}
inline Vec where_below(Vec a, Vec b, Vec from, Vec otherwise) { return {a.v < b.v ? from.v : otherwise.v}; }
inline Vec least(Vec a, Vec b) { return where_below(a, b, a, b); }
inline Vec most(Vec a, Vec b) { return where_below(a, b, b, a); }
inline Vec root(Vec a) {
    for (int i = 0; i < 4; ++i) a.v[i] = std::sqrt(a.v[i]);
    return a;
}
inline Mask not_above(Vec a, Vec b) {
    const auto above = a.v > b.v;  // -1 where true
    return Mask(above[0] + 1) | Mask(above[1] + 1) << 1 | Mask(above[2] + 1) << 2 | Mask(above[3] + 1) << 3;
}

inline Mask unequal(Vec a, Vec b) {
    const auto other = a.v != b.v;
    return Mask(-other[0]) | Mask(-other[1]) << 1 | Mask(-other[2]) << 2 | Mask(-other[3]) << 3;
}

#endif

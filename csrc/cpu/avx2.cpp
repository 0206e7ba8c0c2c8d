#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define RVQA_AVX2
namespace rvqa::avx2 {
namespace {
#include "cpu/simd.h"

#include "cpu/kernels.inl"
}  // namespace
}  // namespace rvqa::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace rvqa {
const Kernels AVX2 = {"avx2", avx2::encode_tile, avx2::square, avx2::score_panel, avx2::nearest_tiles, avx2::distance, avx2::decode, avx2::whole_sum, avx2::log1p_scaled, avx2::project_tile, avx2::W, avx2::multiply_add, avx2::gather_multiply_add};
}  // namespace rvqa
#endif

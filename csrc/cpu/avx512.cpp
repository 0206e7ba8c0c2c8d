#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define RVQA_AVX512
namespace rvqa::avx512 {
namespace {
#include "cpu/simd.h"

#include "cpu/kernels.inl"
}  // namespace
}  // namespace rvqa::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace rvqa {
const Kernels AVX512 = {"avx512", avx512::encode_tile, avx512::square, avx512::score_panel, avx512::nearest_tiles, avx512::distance, avx512::decode, avx512::whole_sum, avx512::log1p_scaled, avx512::project_tile, avx512::W, avx512::multiply_add, avx512::gather_multiply_add};
}  // namespace rvqa
#endif

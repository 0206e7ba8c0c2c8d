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
const Kernels AVX512 = avx512::kernels_called("avx512");
}  // namespace rvqa
#endif

#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
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
const Kernels AVX2 = avx2::kernels_called("avx2");
}  // namespace rvqa
#endif

// All that the kernels use of CUDA: launches that throw on an error, warps, and the tensor cores' instruction.
//
// With RVQA_EMULATE the same sources run on a CPU: tests/cuda/emulation.h replaces the CUDA runtime.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

#ifdef RVQA_EMULATE
#include "emulation.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace rvqa::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xFFFFFFFFu;

#ifdef RVQA_EMULATE

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t grid, int block, int64_t shared, Stream,
            Arguments... arguments) {
    emulation::run(name, int(grid), block, std::size_t(shared), [&] { kernel(Parameters(arguments)...); });
}

#define RVQA_SHARED(name) unsigned char* const name = emulation::shared()

inline uint16_t half_of(float value) { return emulation::half_of(value); }
inline float float_of(uint16_t half) { return emulation::float_of(half); }
inline uint32_t halves_of(float low, float high) { return half_of(low) | uint32_t(half_of(high)) << 16; }
inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulation::mma(sum, a, b); }

#else

inline void require(const char* name, cudaError_t error) {
    if (error == cudaSuccess) return;
    const std::string hint = error == cudaErrorNoKernelImageForDevice
                                 ? "; this build has no code for this GPU: reinstall rvqa with RVQA_BUILD=cuda on it"
                                 : "; RVQA_BACKEND=triton or reference runs without this kernel";
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error) + hint);
}

// Queues a kernel on a stream and never waits for it.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t grid, int block, int64_t shared, Stream stream,
            Arguments... arguments) {
    if (shared > 48 * 1024)
        require(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    kernel<<<unsigned(grid), unsigned(block), std::size_t(shared), stream>>>(Parameters(arguments)...);
    require(name, cudaGetLastError());
}

#define RVQA_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

__device__ inline uint16_t half_of(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ inline float float_of(uint16_t half) { return __half2float(__ushort_as_half(half)); }
__device__ inline uint32_t halves_of(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &both, 4);
    return bits;
}

// sum[16 x 8] += a[16 x 16] b[16 x 8], float16 operands, float32 sums: one instruction of a warp (sm_80 and up). Lane
// 4 g + t holds a: rows g, g + 8, columns 2t, 2t + 1 and 2t + 8, 2t + 9; b: rows 2t, 2t + 1, 2t + 8, 2t + 9 of column g;
// sum: rows g, g + 8, columns 2t, 2t + 1.
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

template <class T>
__device__ T warp_sum(T value) {
    for (int step = WARP / 2; step; step /= 2) value += __shfl_xor_sync(ALL, value, step);
    return value;
}

template <class T>
__device__ T warp_max(T value) {
    for (int step = WARP / 2; step; step /= 2) {
        const T other = __shfl_xor_sync(ALL, value, step);
        value = other > value ? other : value;
    }
    return value;
}

}  // namespace rvqa::cuda

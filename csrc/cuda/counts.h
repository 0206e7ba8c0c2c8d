// Entries of CSR matrices of any of the dtypes that hold counts.
#pragma once

#include "cuda/device.h"

namespace rvqa::cuda {

__device__ inline int64_t integer_at(const void* data, bool wide, int64_t at) {
    return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
}

__device__ inline double count_at(const Counts& c, int64_t at) {
    switch (c.dtype) {
        case Count::float32: return static_cast<const float*>(c.data)[at];
        case Count::float64: return static_cast<const double*>(c.data)[at];
        case Count::int32: return static_cast<const int32_t*>(c.data)[at];
        case Count::uint8: return static_cast<const uint8_t*>(c.data)[at];
        case Count::uint16: return static_cast<const uint16_t*>(c.data)[at];
        default: return static_cast<const uint32_t*>(c.data)[at];
    }
}

}  // namespace rvqa::cuda

#include <cmath>
#include <cstdint>

#include "cpu/isa.h"

namespace rvqa::portable {
namespace {
#include "cpu/simd.h"

#include "cpu/kernels.inl"
}  // namespace
}  // namespace rvqa::portable

namespace rvqa {
const Kernels PORTABLE = portable::kernels_called("portable");
}  // namespace rvqa

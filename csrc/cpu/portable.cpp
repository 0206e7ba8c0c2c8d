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
const Kernels PORTABLE = {"portable", portable::encode_tile, portable::square, portable::score_panel, portable::nearest_tiles, portable::distance, portable::decode, portable::whole_sum, portable::log1p_scaled, portable::project_tile, portable::W, portable::multiply_add, portable::gather_multiply_add};
}  // namespace rvqa

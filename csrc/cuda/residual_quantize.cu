// Codes uint8 [N, M] of rows [N, D]; see codes.h for the two kernels behind it, and for what is exact.
#include "cuda/codes.h"
#include "cuda/kernels.h"

namespace rvqa::cuda {

void residual_quantize(const Rows& x, const Tables& t, uint8_t* codes, unsigned long long* open, unsigned long long* found,
                       Stream stream) {
    if (x.N == 0) return;
    find_codes(x, t, {codes, nullptr, t.M}, open, found, stream);
}

}  // namespace rvqa::cuda

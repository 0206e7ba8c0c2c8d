// Kernels that are wrong, each in one way: the emulation has to notice.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cuda/device.h"

namespace {

using namespace rvqa::cuda;

// Each thread writes its number and reads its neighbour's; without the barrier that is a race.
void neighbour(int* out, bool barrier) {
    RVQA_SHARED(memory);
    int* const number = reinterpret_cast<int*>(memory);
    number[threadIdx.x] = int(threadIdx.x);
    if (barrier) __syncthreads();
    out[threadIdx.x] = number[(threadIdx.x + 1) % blockDim.x];
}

void leaves_early() {
    if (threadIdx.x == 5) return;
    __syncthreads();
}

void votes_alone() {
    if (threadIdx.x < 7) __ballot_sync(ALL, true);
}

void writes_outside() {
    RVQA_SHARED(memory);
    if (threadIdx.x == 0) memory[64] = 1;
}

}  // namespace

PYBIND11_MODULE(faults, m) {
    m.def("emulate", &emulation::configure);
    m.def("neighbour", [](bool barrier) {
        std::vector<int> out(64);
        launch("neighbour", neighbour, 1, 64, 64 * 4, nullptr, out.data(), barrier);
        return out;
    });
    m.def("leaves_early", [] { launch("leaves_early", leaves_early, 1, 64, 0, nullptr); });
    m.def("votes_alone", [] { launch("votes_alone", votes_alone, 1, 32, 0, nullptr); });
    m.def("writes_outside", [] { launch("writes_outside", writes_outside, 1, 32, 64, nullptr); });
}

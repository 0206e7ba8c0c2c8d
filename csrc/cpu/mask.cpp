#include "cpu/mask.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/pool.h"

namespace rvqa {
namespace {

constexpr int64_t PIECE = 1 << 18;   // bytes of logits in one part of the work
constexpr int64_t SHARE = 1 << 22;   // bytes to write above which it pays to wake a second thread
constexpr int64_t STREAM = 1 << 26;  // bytes to write above which stores bypass the caches, which could not hold them

struct Span {
    int64_t lo, hi;
    bool inside;
};

Span span(const int64_t* window, int64_t V) {
    const int64_t lo = std::clamp<int64_t>(window[0], 0, V);
    return {lo, std::clamp(window[1], lo, V), window[2] != 0};
}

}  // namespace

template <class State>
int64_t apply_span_mask(const Logits& logits, const State* states, const int64_t* windows, int64_t S, int threads) {
    const int64_t V = logits.V, width = logits.dtype == Real::float32 ? 4 : 2;
    int64_t wrong = 0, bytes = 0;
    if (logits.B == 0) return 0;
    const int64_t extent = V ? ((logits.B - 1) * logits.stride + V) * width : 0;
    if (overlap(logits.data, extent, states, logits.B * int64_t(sizeof(State))) ||
        overlap(logits.data, extent, windows, 3 * S * int64_t(sizeof(int64_t))))
        throw std::invalid_argument("logits share memory with states or windows; pass a copy of these");
    for (int64_t b = 0; b < logits.B; ++b) {
        if (states[b] < -1 || states[b] >= S) ++wrong;
        if (wrong || states[b] < 0) continue;
        const Span keep = span(windows + 3 * states[b], V);
        bytes += width * (keep.inside ? V - (keep.hi - keep.lo) : keep.hi - keep.lo);
    }
    if (wrong || bytes == 0) return wrong;

    const Kernels& isa = kernels();
    const uint32_t infinity =
        logits.dtype == Real::float32 ? 0xFF800000 : logits.dtype == Real::bfloat16 ? 0xFF80FF80 : 0xFC00FC00;
    const int64_t columns = PIECE / width, pieces = (V + columns - 1) / columns;
    parallel(logits.B * pieces, std::max<int64_t>(1, columns / V), int(std::min<int64_t>(threads, 1 + bytes / SHARE)),
             [&](int64_t begin, int64_t end) {
                 for (int64_t piece = begin; piece < end; ++piece) {
                     const int64_t b = piece / pieces, first = piece % pieces * columns;
                     const int64_t last = std::min(first + columns, V);
                     const int64_t state = states[b];
                     if (state < 0) continue;
                     const auto fill = [&](int64_t from, int64_t to) {
                         char* at = static_cast<char*>(logits.data) + (b * logits.stride + from) * width;
                         if (from < to) isa.fill(at, (to - from) * width, width, infinity, bytes >= STREAM);
                     };
                     const Span keep = span(windows + 3 * state, V);
                     if (keep.inside) {
                         fill(first, std::min(last, keep.lo));
                         fill(std::max(first, keep.hi), last);
                     } else {
                         fill(std::max(first, keep.lo), std::min(last, keep.hi));
                     }
                 }
             });
    return 0;
}

template int64_t apply_span_mask(const Logits&, const int32_t*, const int64_t*, int64_t, int);
template int64_t apply_span_mask(const Logits&, const int64_t*, const int64_t*, int64_t, int);

}  // namespace rvqa

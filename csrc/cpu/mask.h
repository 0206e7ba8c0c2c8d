// Logits of ids that a row may not write, set to minus infinity in place.
#pragma once

#include <cstdint>

#include "cpu/quantize.h"

namespace rvqa {

// Rows of logits: contiguous columns, any distance of at least V between rows (in elements).
struct Logits {
    void* data;
    int64_t B, V, stride;
    Real dtype;
};

// Row b follows windows[states[b]], three numbers (lo, hi, inside): only ids in [lo, hi) stay where inside is not 0, all
// others where it is. A state of -1 leaves its row. What stays is not touched, nor is anything outside of [0, V).
// Throws std::invalid_argument where the three share memory.
// Returns the number of states outside of -1 .. S - 1, and writes nothing where there are any.
template <class State>
int64_t apply_span_mask(const Logits& logits, const State* states, const int64_t* windows, int64_t S, int threads);

}  // namespace rvqa

// Sets the logits of ids that a row may not write to minus infinity, in place.
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

// Row b follows windows[states[b]], three numbers (lo, hi, inside). If inside is not 0, only ids in [lo, hi) stay; if
// it is 0, only the others. A state of -1 leaves its row as it is. Nothing else is written.
// Throws std::invalid_argument if the three share memory.
// Returns the number of states outside -1 .. S - 1, and writes nothing if there are any.
template <class State>
int64_t apply_span_mask(const Logits& logits, const State* states, const int64_t* windows, int64_t S, int threads);

}  // namespace rvqa

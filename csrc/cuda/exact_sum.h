// Sums of float64 values without rounding, spread over a warp: fixed point in digits of 32 bits.
//
// Each lane adds values into its own digits, held as int64, so that 2^30 additions need no carry. `gather` adds the
// digits of all lanes, and every lane then has the sum. Values are multiples of 2^LOWEST below
// 2^(LOWEST + 32 DIGITS - 32).
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device.h"

namespace rvqa::cuda {

template <int LOWEST, int DIGITS>
class ExactSum {
  public:
    __device__ void clear() {
        for (int i = 0; i < DIGITS; ++i) digit_[i] = 0;
    }

    __device__ void add(double value) {
        uint64_t bits;
        std::memcpy(&bits, &value, 8);
        const int biased = int(bits >> 52 & 0x7FF);
        if (biased == 0) return;  // 0: no value here is subnormal in float64
        const uint64_t mantissa = (bits & 0xFFFFFFFFFFFFFull) | 1ull << 52;
        int place = biased - 1075 - LOWEST;  // place of the mantissa's last bit; bits below place 0 are zeros
        const uint64_t kept = place < 0 ? mantissa >> -place : mantissa;
        place = place < 0 ? 0 : place;
        const int at = place / 32, shift = place % 32;
        const uint64_t low = (kept & 0xFFFFFFFFull) << shift, high = (kept >> 32) << shift;
        const int64_t sign = bits >> 63 ? -1 : 1;
        digit_[at] += sign * int64_t(low & 0xFFFFFFFFull);
        digit_[at + 1] += sign * int64_t((low >> 32) + (high & 0xFFFFFFFFull));
        digit_[at + 2] += sign * int64_t(high >> 32);
    }

    // Adds up the lanes and carries, so that all digits but the highest are in [0, 2^32).
    __device__ void gather() {
        for (int i = 0; i < DIGITS; ++i) digit_[i] = warp_sum(digit_[i]);
        for (int i = 0; i + 1 < DIGITS; ++i) {
            digit_[i + 1] += digit_[i] >> 32;
            digit_[i] &= 0xFFFFFFFFll;
        }
    }

    // -1, 0 or 1, after `gather`.
    __device__ int sign() const {
        if (digit_[DIGITS - 1] < 0) return -1;
        for (int i = 0; i < DIGITS; ++i)
            if (digit_[i]) return 1;
        return 0;
    }

    // The sum, of at least 0, rounded once to float64, to nearest, ties to even; after `gather`.
    __device__ double rounded() const {
        int top = DIGITS - 1;
        while (top > 0 && digit_[top] == 0) --top;
        const auto digit = [&](int i) { return i < 0 ? 0ull : uint64_t(digit_[i]); };
        uint64_t head = digit(top) << 32 | digit(top - 1);  // its leading 64 bits, except for leading zeros
        if (head == 0) return 0;
        int zeros = 0;
        while (!(head >> 63)) {
            head <<= 1;
            ++zeros;
        }
        if (zeros) head |= (digit(top - 2) << 32 | digit(top - 3)) >> (64 - zeros);
        bool rest = zeros < 64 && ((digit(top - 2) << 32 | digit(top - 3)) << zeros) != 0;
        for (int i = top - 4; i >= 0; --i) rest |= digit_[i] != 0;
        uint64_t mantissa = head >> 11;
        const uint64_t cut = head & 0x7FF;
        if (cut > 0x400 || (cut == 0x400 && (rest || (mantissa & 1)))) ++mantissa;
        double value = double(mantissa);
        return ldexp(value, LOWEST + 32 * (top - 1) - zeros + 11);
    }

  private:
    int64_t digit_[DIGITS];
};

}  // namespace rvqa::cuda

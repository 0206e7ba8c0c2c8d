// Exactness depends on two things here: the default floating-point environment, and sums without rounding.
//
// ExactSum holds a sum of doubles as an expansion: non-overlapping parts of increasing magnitude whose exact sum is the
// exact sum of what was added (Shewchuk, Discrete & Computational Geometry 1997; the algorithm behind Python's fsum).
// It is valid while no intermediate sum overflows.
#pragma once

#include <cfenv>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

#if defined(__FAST_MATH__)
#error "rvqa counts roundings: it cannot be built with -ffast-math"
#endif

namespace rvqa {

static_assert(FLT_EVAL_METHOD == 0, "float and double operations must round to their own type");

// Sets round to nearest and gradual underflow for the current thread, whatever the host program has set.
class DefaultFloatEnvironment {
  public:
    DefaultFloatEnvironment() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
    DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
    DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

  private:
    std::fenv_t saved_;
};

class ExactSum {
  public:
    void clear() { parts_.clear(); }

    void add(double value) {
        std::size_t kept = 0;
        for (double part : parts_) {
            if (std::fabs(value) < std::fabs(part)) std::swap(value, part);
            const double high = value + part;
            const double low = part - (high - value);
            if (low != 0) parts_[kept++] = low;
            value = high;
        }
        parts_.resize(kept);
        if (value != 0) parts_.push_back(value);
    }

    // -1, 0 or 1. The largest part decides, because it outweighs all others together.
    int sign() const { return parts_.empty() ? 0 : (parts_.back() < 0 ? -1 : 1); }

    // The sum rounded once to double, to nearest, ties to even.
    double rounded() const {
        if (parts_.empty()) return 0;
        std::size_t i = parts_.size() - 1;
        double high = parts_[i], low = 0;
        while (i > 0 && low == 0) {
            const double part = parts_[--i];
            const double sum = high + part;
            low = part - (sum - high);
            high = sum;
        }
        // low is half an ulp, and a smaller part has its sign: the tie was broken the wrong way.
        if (i > 0 && ((low < 0 && parts_[i - 1] < 0) || (low > 0 && parts_[i - 1] > 0))) {
            const double twice = low * 2, next = high + twice;
            if (twice == next - high) high = next;
        }
        return high;
    }

  private:
    std::vector<double> parts_;
};

}  // namespace rvqa

// Runs CUDA C++ on a CPU, for tests: one block at a time, a fiber a thread.
//
// A barrier, a shuffle or a vote lets a fiber wait until all of its block or warp are there; a thread that leaves before
// one, so that others would wait for ever, is an error. `configure` sets the order in which fibers run (forward, reversed,
// or drawn anew for each round): what depends on it is a race. Shared memory is poisoned before each block and lies
// between guards. `mma` has the arithmetic of the tensor cores of Hopper or Ampere (arXiv 2511.10909).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __noinline__

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline float __saturatef(float value) { return value > 0 ? (value < 1 ? value : 1.0f) : 0.0f; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace emulation {

constexpr int WARP = 32;
constexpr std::size_t STACK = 1 << 17, GUARD = 256;

inline std::string order = "forward";
inline uint64_t seed = 0;
// Of the tensor cores: products that are added at a time, and bits below the largest that are kept.
inline int at_a_time = 16, kept = 25;
inline void configure(const std::string& given_order, uint64_t given_seed, const std::string& architecture) {
    if (architecture != "Hopper" && architecture != "Ampere") throw std::invalid_argument("no " + architecture);
    at_a_time = architecture == "Hopper" ? 16 : 8, kept = architecture == "Hopper" ? 25 : 24;
    if (given_order != "forward" && given_order != "reversed" && given_order != "shuffled")
        throw std::invalid_argument("no order " + given_order);
    order = given_order, seed = given_seed;
}

// A fiber begins by `swapcontext`, which asks the system for its signal mask; later turns are jumps, which do not.
struct Fiber {
    ucontext_t context;
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool begun = false, done = false;
    bool waits = false;  // at a barrier of `members` fibers
    int first = 0, members = 0;
};

// What fibers of a warp hand to each other.
struct Exchange {
    uint64_t value[WARP];
    uint32_t a[WARP][4], b[WARP][2];
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Exchange> warps;
    std::vector<unsigned char> memory;
    ucontext_t start;
    jmp_buf scheduler;
    int running = 0;
    std::function<void()> body;
    std::exception_ptr error;
};

inline Block* block = nullptr;

inline unsigned char* shared() { return block->memory.data() + GUARD; }
inline int thread() { return block->running; }
inline Exchange& exchange() { return block->warps[thread() / WARP]; }

inline void leave() {
    if (!_setjmp(block->fibers[thread()].place)) _longjmp(block->scheduler, 1);
}

// Waits until the fibers [first, first + members) are all here.
inline void wait(int first, int members) {
    Fiber& me = block->fibers[thread()];
    me.waits = true, me.first = first, me.members = members;
    leave();
}

inline void wait_warp() {
    const int first = thread() / WARP * WARP;
    wait(first, std::min<int>(WARP, int(block->fibers.size()) - first));
}

inline void enter() {
    for (;;) {  // once for each block of the grid
        try {
            block->body();
        } catch (...) {
            block->error = std::current_exception();
        }
        block->fibers[thread()].done = true;
        leave();
    }
}

// Lets a fiber run until it waits or ends.
inline void turn_to(Fiber& fiber) {
    if (_setjmp(block->scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    swapcontext(&block->start, &fiber.context);
}

// Barriers whose members have all arrived let them go; true if one did.
inline bool release() {
    bool freed = false;
    auto& fibers = block->fibers;
    for (std::size_t i = 0; i < fibers.size(); ++i) {
        const Fiber& fiber = fibers[i];
        if (!fiber.waits || int(i) != fiber.first) continue;  // its first member speaks for a barrier
        const auto begin = fibers.begin() + fiber.first, end = begin + fiber.members;
        const int first = fiber.first, members = fiber.members;
        const auto here = [&](const Fiber& other) {
            return other.waits && other.first == first && other.members == members;
        };
        if (!std::all_of(begin, end, here)) continue;
        std::for_each(begin, end, [](Fiber& other) { other.waits = false; });
        freed = true;
    }
    return freed;
}

inline void run_block(const char* name, std::mt19937_64& random) {
    auto& fibers = block->fibers;
    const int n = int(fibers.size());
    std::vector<int> turn(n);
    for (int i = 0; i < n; ++i) turn[i] = order == "reversed" ? n - 1 - i : i;
    for (;;) {
        if (order == "shuffled") std::shuffle(turn.begin(), turn.end(), random);
        bool moved = false;
        for (const int i : turn) {
            if (fibers[i].done || fibers[i].waits) continue;
            block->running = i;
            threadIdx.x = unsigned(i);
            turn_to(fibers[i]);
            moved = true;
            if (block->error) std::rethrow_exception(block->error);
        }
        if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.done; })) return;
        if (!release() && !moved)
            throw std::runtime_error(std::string(name) + ": a thread left before a barrier that others wait at");
    }
}

inline void run(const char* name, int grid, int threads, std::size_t bytes, std::function<void()> body) {
    Block mine;
    mine.fibers.resize(threads);
    mine.warps.resize((threads + WARP - 1) / WARP);
    mine.body = std::move(body);
    for (Fiber& fiber : mine.fibers) {
        fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.get(), 0, STACK};
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    block = &mine;
    std::fenv_t environment;  // of a CPU, which a GPU does not see
    std::feholdexcept(&environment);
    std::fesetenv(FE_DFL_ENV);
    std::mt19937_64 random(seed);
    blockDim.x = unsigned(threads), gridDim.x = unsigned(grid);
    for (volatile int b = 0; b < grid; b = b + 1) {
        blockIdx.x = unsigned(b);
        mine.memory.assign(bytes + 2 * GUARD, 0xA5);
        for (Fiber& fiber : mine.fibers) fiber.done = fiber.waits = false;
        run_block(name, random);
        const auto whole = [](unsigned char byte) { return byte == 0xA5; };
        if (!std::all_of(mine.memory.begin(), mine.memory.begin() + GUARD, whole) ||
            !std::all_of(mine.memory.end() - GUARD, mine.memory.end(), whole))
            throw std::runtime_error(std::string(name) + ": wrote outside its shared memory");
    }
    std::fesetenv(&environment);
    block = nullptr;
}

template <class T>
T hand_over(T value, int from) {
    static_assert(sizeof(T) <= 8);
    std::memcpy(&exchange().value[thread() % WARP], &value, sizeof(T));
    wait_warp();
    std::memcpy(&value, &exchange().value[from % WARP], sizeof(T));
    wait_warp();
    return value;
}

inline uint16_t half_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const float size = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7E00;
    if (size >= 65520) return sign | 0x7C00;
    // Rounded by an addition: to multiples of 2^-24 below 2^-14, else to 11 bits.
    const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
    const double step = std::ldexp(1.0, exponent - 10), scaled = std::nearbyint(double(size) / step);
    const auto units = uint32_t(scaled);
    return uint16_t(sign | (size < 0x1p-14f ? units : uint32_t(exponent + 14) * 1024 + units));
}

inline float float_of(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                      : std::ldexp(float(fraction), -24);
    return half & 0x8000 ? -size : size;
}

// Sum of some products and an addend: all cut at 2^-kept of the largest exponent, added exactly, rounded to float32
// towards zero.
inline float dot(const uint16_t* a, const uint16_t* b, float addend) {
    double terms[17];
    int top = -108 - kept;  // of zeros
    for (int i = 0; i < at_a_time; ++i) {
        terms[i] = double(float_of(a[i])) * double(float_of(b[i]));
        // The exponent of a product is the sum of those of its factors; subnormal factors have that of 2^-14.
        if (terms[i] != 0) {
            const auto exponent = [](uint16_t half) { return (half >> 10 & 31) ? (half >> 10 & 31) - 15 : -14; };
            top = std::max(top, exponent(a[i]) + exponent(b[i]));
        }
    }
    terms[at_a_time] = addend;
    if (addend != 0) top = std::max(top, std::max(std::ilogb(addend), -126));
    double total = 0;
    for (int i = 0; i <= at_a_time; ++i) {
        if (!std::isfinite(terms[i])) return float(terms[i]) * 0;  // NaN: no kernel here adds what is not finite
        total += std::trunc(std::ldexp(terms[i], kept - top));
    }
    const double exact = std::ldexp(total, top - kept);
    const float near = float(exact);
    return std::fabs(double(near)) > std::fabs(exact) ? std::nextafter(near, 0.0f) : near;
}

inline void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const int lane = thread() % WARP;
    std::memcpy(exchange().a[lane], a, sizeof a);
    std::memcpy(exchange().b[lane], b, sizeof b);
    wait_warp();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        uint16_t left[16], right[16];
        for (int k = 0; k < 16; ++k) {
            const int within = k % 8 / 2;
            const uint32_t from_a = exchange().a[row % 8 * 4 + within][row / 8 + k / 8 * 2];
            const uint32_t from_b = exchange().b[column * 4 + within][k / 8];
            left[k] = uint16_t(from_a >> (k % 2 * 16));
            right[k] = uint16_t(from_b >> (k % 2 * 16));
        }
        for (int k = 0; k < 16; k += at_a_time) sum[i] = dot(left + k, right + k, sum[i]);
    }
    wait_warp();
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::hand_over(value, emulation::thread() % emulation::WARP ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulation::hand_over(value, lane);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    emulation::exchange().value[emulation::thread() % emulation::WARP] = vote;
    emulation::wait_warp();
    unsigned votes = 0;
    for (int i = 0; i < emulation::WARP; ++i) votes |= unsigned(emulation::exchange().value[i] & 1) << i;
    emulation::wait_warp();
    return votes;
}
inline void __syncwarp() { emulation::wait_warp(); }
inline void __syncthreads() { emulation::wait(0, int(emulation::block->fibers.size())); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class T, class U>
T atomicAdd(T* at, U value) {
    const T before = *at;
    *at = before + T(value);
    return before;
}
inline unsigned long long atomicMin(unsigned long long* at, unsigned long long value) {
    const unsigned long long before = *at;
    *at = std::min(before, value);
    return before;
}

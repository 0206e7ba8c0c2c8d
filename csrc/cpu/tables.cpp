#include "cpu/tables.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cpu/exact.h"

namespace rvqa {
namespace {

constexpr uint64_t MAGIC = 0x0001'5451'4156'5152;  // "RQVAQT", layout 1
constexpr double SLACK = 1 + 0x1p-19;    // covers the float32 roundings of the bound itself
constexpr double SAFE = 0x1p126;         // no float32 operation of the fast path overflows below this
constexpr std::size_t ALIGN = 64;

struct Header {
    uint64_t magic;
    int64_t M, K, D;
    float square_growth;
};

// Offsets of the parts, each aligned.
struct Layout {
    std::size_t w, b, c, norm, bound, end;

    Layout(int64_t M, int64_t K, int64_t D) {
        const int64_t panels = (K + PANEL - 1) / PANEL, padded = (D + PAD - 1) / PAD * PAD;
        std::size_t at = 0;
        const auto part = [&](std::size_t bytes) {
            const std::size_t start = at;
            at = (at + bytes + ALIGN - 1) / ALIGN * ALIGN;
            return start;
        };
        part(sizeof(Header));
        w = part(sizeof(float) * M * panels * PANEL * D);
        b = part(sizeof(float) * M * panels * PANEL);
        c = part(sizeof(float) * M * K * padded);
        norm = part(sizeof(double) * M * K);
        bound = part(sizeof(Bound) * M);
        end = at;
    }
};

float round_up(double value) {
    const float rounded = float(value);
    return double(rounded) < value ? std::nextafter(rounded, std::numeric_limits<float>::infinity()) : rounded;
}

// For each codeword, the index of the first one of equal value (-0 equals 0); its own index if none comes before it.
std::vector<int64_t> firsts(const float* codebook, int64_t K, int64_t D) {
    std::vector<float> values(codebook, codebook + K * D);
    for (float& value : values) value += 0.0f;  // -0 becomes 0
    std::unordered_map<std::string_view, int64_t> seen;
    std::vector<int64_t> first(K);
    for (int64_t k = 0; k < K; ++k) {
        const std::string_view bytes(reinterpret_cast<const char*>(&values[k * D]), sizeof(float) * D);
        first[k] = seen.emplace(bytes, k).first->second;
    }
    return first;
}

double norm_of(const float* v, int64_t D) {
    double sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += double(v[d]) * double(v[d]);
    return std::sqrt(sum);
}

Bound bound_of(double C, int64_t D) {
    const float infinity = std::numeric_limits<float>::infinity();
    const double n = double(D + 3) * U;
    const double most = (SAFE - C * C) / (2 * C);  // of nu: 2 nu C + C^2 <= SAFE
    if (n > 0.25 || !(most > 0)) return {infinity, infinity, infinity, -1};
    const double g = n / (1 - n);
    return {round_up(SLACK * 4 * C), round_up(SLACK * 4 * C * g),
            round_up(SLACK * 2 * (3.2 * U * C * C + double(D + 8) * 0x1p-149)), float(std::min(most, 0x1p126) * (1 - 0x1p-20))};
}

}  // namespace

std::size_t packed_size(int64_t M, int64_t K, int64_t D) { return Layout(M, K, D).end; }

void prepare(const float* codebooks, int64_t M, int64_t K, int64_t D, uint8_t* packed) {
    const DefaultFloatEnvironment environment;
    const Layout layout(M, K, D);
    std::memset(packed, 0, layout.end);
    const double n = double(D + 2) * U;
    const Header header{MAGIC, M, K, D,
                        n < 0.25 ? round_up(1 / (1 - n / (1 - n))) : std::numeric_limits<float>::infinity()};
    std::memcpy(packed, &header, sizeof header);
    const int64_t panels = (K + PANEL - 1) / PANEL, padded = (D + PAD - 1) / PAD * PAD;
    float* w = reinterpret_cast<float*>(packed + layout.w);
    float* b = reinterpret_cast<float*>(packed + layout.b);
    float* c = reinterpret_cast<float*>(packed + layout.c);
    double* norm = reinterpret_cast<double*>(packed + layout.norm);
    Bound* bound = reinterpret_cast<Bound*>(packed + layout.bound);
    std::fill(b, b + M * panels * PANEL, std::numeric_limits<float>::infinity());
    for (int64_t m = 0; m < M; ++m) {
        const float* codebook = codebooks + m * K * D;
        const std::vector<int64_t> first = firsts(codebook, K, D);
        double C = 0;
        for (int64_t k = 0; k < K; ++k) {
            const float* codeword = codebook + k * D;
            std::copy(codeword, codeword + D, c + (m * K + k) * padded);
            float* column = w + ((m * panels + k / PANEL) * D) * PANEL + k % PANEL;
            for (int64_t d = 0; d < D; ++d) column[d * PANEL] = -2.0f * codeword[d];
            const double length = norm_of(codeword, D);
            norm[m * K + k] = length;
            if (first[k] == k) b[m * panels * PANEL + k] = float(length * length);
            C = std::max(C, length);
        }
        bound[m] = bound_of(C, D);
    }
}

Tables view(const uint8_t* packed, std::size_t size, int64_t M, int64_t K, int64_t D) {
    Header header{};
    if (reinterpret_cast<uintptr_t>(packed) % alignof(double)) size = 0;
    if (size >= sizeof header) std::memcpy(&header, packed, sizeof header);
    if (header.magic != MAGIC || header.M != M || header.K != K || header.D != D || size != packed_size(M, K, D))
        throw std::invalid_argument("these are not tables of rvqa.kernels.ops.prepare for these codebooks");
    const Layout layout(M, K, D);
    return {M,
            K,
            D,
            (K + PANEL - 1) / PANEL,
            (D + PAD - 1) / PAD * PAD,
            header.square_growth,
            reinterpret_cast<const float*>(packed + layout.w),
            reinterpret_cast<const float*>(packed + layout.b),
            reinterpret_cast<const float*>(packed + layout.c),
            reinterpret_cast<const double*>(packed + layout.norm),
            reinterpret_cast<const Bound*>(packed + layout.bound)};
}

}  // namespace rvqa

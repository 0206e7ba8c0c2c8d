// Python bindings of the CUDA kernels: addresses on the device, sizes and a stream. The caller,
// kernels/cuda/backend.py, passes valid contiguous memory that lives until the stream has finished with it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>

#include "cuda/kernels.h"
#ifdef RVQA_EMULATE
#include "cuda/device.h"
#endif

#ifndef RVQA_MODULE
#define RVQA_MODULE _cuda
#endif

namespace py = pybind11;

namespace {

using namespace rvqa::cuda;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Stream stream_at(Address stream) { return reinterpret_cast<Stream>(stream); }

Real real(const std::string& dtype) {
    if (dtype == "float32") return Real::float32;
    if (dtype == "bfloat16") return Real::bfloat16;
    if (dtype == "float16") return Real::float16;
    throw std::invalid_argument("no rows of dtype " + dtype);
}

Count count(const std::string& dtype) {
    const std::array<const char*, 6> names{"float32", "float64", "int32", "uint8", "uint16", "uint32"};
    for (std::size_t i = 0; i < names.size(); ++i)
        if (dtype == names[i]) return Count(int(i));
    throw std::invalid_argument("no counts of dtype " + dtype);
}

using Row = std::tuple<Address, int64_t, int64_t, std::string>;                    // data, N, stride, dtype
using Made = std::array<Address, 7>;                                               // in the order of Tables
using Sizes = std::array<int, 4>;                                                  // M, K, D, D'
using Matrix = std::tuple<Address, Address, Address, bool, bool, std::string, int64_t>;  // in the order of Counts

Rows rows_at(const Row& x) { return {at<void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), real(std::get<3>(x))}; }

Tables tables_at(const Made& t, const Sizes& sizes) {
    return {sizes[0],           sizes[1],        sizes[2],        sizes[3],        at<float>(t[0]), at<float>(t[1]),
            at<uint16_t>(t[2]), at<float>(t[3]), at<float>(t[4]), at<float>(t[5]), at<double>(t[6])};
}

Counts counts_at(const Matrix& m) {
    return {at<void>(std::get<0>(m)), at<void>(std::get<1>(m)), at<void>(std::get<2>(m)), std::get<3>(m),
            std::get<4>(m), count(std::get<5>(m)), std::get<6>(m)};
}

#ifdef RVQA_EMULATE
// sum[16 x 8] += a[16 x 16] b[8 x 16]', placed in the lanes as the instruction has them.
void multiply_matrices(const uint16_t* a, const uint16_t* b, float* sum, int lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    uint32_t left[4], right[2];
    float own[4];
    for (int i = 0; i < 4; ++i) {
        std::memcpy(&left[i], a + (group + i % 2 * 8) * 16 + pair + i / 2 * 8, 4);
        own[i] = sum[(group + i / 2 * 8) * 8 + pair + i % 2];
    }
    for (int i = 0; i < 2; ++i) std::memcpy(&right[i], b + group * 16 + pair + i * 8, 4);
    multiply_add(own, left, right);
    for (int i = 0; i < 4; ++i) sum[(group + i / 2 * 8) * 8 + pair + i % 2] = own[i];
}
#endif

}  // namespace

PYBIND11_MODULE(RVQA_MODULE, m) {
    m.doc() = "CUDA kernels of rvqa; use them through rvqa.kernels.ops.";
#ifdef RVQA_EMULATE
    m.attr("EMULATED") = true;
    m.def("emulate", &emulation::configure, py::arg("order"), py::arg("seed"), py::arg("architecture"));
    m.def("multiply_add", [](Address a, Address b, Address sum) {
        emulation::run("multiply_add", 1, WARP, 0, [=] {
            multiply_matrices(at<uint16_t>(a), at<uint16_t>(b), at<float>(sum), int(threadIdx.x));
        });
    });
#else
    m.attr("EMULATED") = false;
#endif
    m.def("residual_quantize", [](const Row& x, const Made& t, const Sizes& sizes, Address codes, Address open,
                                  Address found, Address stream) {
        residual_quantize(rows_at(x), tables_at(t, sizes), at<uint8_t>(codes), at<unsigned long long>(open),
                          at<unsigned long long>(found), stream_at(stream));
    });
    m.def("nearest_codeword", [](const Row& x, const Made& t, const Sizes& sizes, Address index, Address distances,
                                 Address open, Address found, Address stream) {
        nearest_codeword(rows_at(x), tables_at(t, sizes), at<int64_t>(index), at<float>(distances),
                         at<unsigned long long>(open), at<unsigned long long>(found), stream_at(stream));
    });
    m.def("decode", [](Address codes, int64_t stride, int64_t N, int levels, Address codebooks, int K, int D, Address out,
                       Address stream) {
        decode(at<uint8_t>(codes), stride, N, levels, at<float>(codebooks), K, D, at<float>(out), stream_at(stream));
    });
    m.def("apply_span_mask", [](Address logits, int64_t stride, int64_t B, int V, const std::string& dtype, Address states,
                                Address windows, int S, Address stream) {
        apply_span_mask(at<void>(logits), stride, B, V, real(dtype), at<int64_t>(states), at<int64_t>(windows), S,
                        stream_at(stream));
    });
    m.def("csr_totals", [](const Matrix& counts, int64_t columns, Address known, Address totals, Address wrong,
                           Address stream) {
        csr_totals(counts_at(counts), columns, at<uint8_t>(known), at<double>(totals), at<unsigned long long>(wrong),
                   stream_at(stream));
    });
    m.def("csr_project", [](const Matrix& counts, Address column_map, Address library, double target_sum, Address weight,
                            Address bias, int64_t G, int H, Address hidden, Address open, Address stream) {
        csr_project(counts_at(counts), at<int64_t>(column_map), at<double>(library), target_sum, at<float>(weight),
                    at<float>(bias), G, H, at<float>(hidden), at<uint8_t>(open), stream_at(stream));
    });
}

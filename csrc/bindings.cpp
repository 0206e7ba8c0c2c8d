// Python bindings of the native kernels, and the only file that knows Python. They take addresses and sizes, write
// results to memory that Python owns, and release the GIL. The caller, kernels/cpu/backend.py, passes valid contiguous
// memory; the kernels check the values in it. std::invalid_argument becomes rvqa.errors.InputError.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cpu/counts.h"
#include "cpu/isa.h"
#include "cpu/mask.h"
#include "cpu/pool.h"
#include "cpu/project.h"
#include "cpu/quantize.h"
#include "cpu/tables.h"

namespace py = pybind11;

namespace {

// Memory of torch.frombuffer may begin at any byte, but a vector load needs the alignment of the type.
void require_aligned(std::uintptr_t address, std::size_t size) {
    if (address % size) throw std::invalid_argument("a tensor begins between two of its elements; pass a copy, .clone()");
}

template <class T>
T* at(std::uintptr_t address) {
    if constexpr (!std::is_void_v<T>) require_aligned(address, alignof(T));
    return reinterpret_cast<T*>(address);
}

rvqa::Real real(const std::string& dtype) {
    if (dtype == "float32") return rvqa::Real::float32;
    if (dtype == "bfloat16") return rvqa::Real::bfloat16;
    if (dtype == "float16") return rvqa::Real::float16;
    throw std::invalid_argument("no rows of dtype " + dtype);
}

using Address = std::uintptr_t;
using Sizes = std::array<int64_t, 3>;  // M, K, D

rvqa::Rows rows_at(Address x, int64_t N, int64_t stride, const std::string& dtype) {
    const rvqa::Rows rows{at<void>(x), N, stride, real(dtype)};
    require_aligned(x, rows.dtype == rvqa::Real::float32 ? 4 : 2);
    return rows;
}

rvqa::Tables tables(Address packed, int64_t size, const Sizes& sizes) {
    return rvqa::view(at<uint8_t>(packed), size, sizes[0], sizes[1], sizes[2]);
}

std::pair<int64_t, int64_t> residual_quantize(Address x, int64_t N, int64_t stride, const std::string& dtype,
                                              Address packed, int64_t size, const Sizes& sizes, int64_t levels, int threads,
                                              Address codes) {
    const rvqa::Rows rows = rows_at(x, N, stride, dtype);
    const py::gil_scoped_release release;
    const auto wrong =
        rvqa::residual_quantize(rows, tables(packed, size, sizes), levels, threads, at<uint8_t>(codes));
    return {wrong.count, wrong.first};
}

std::pair<int64_t, int64_t> nearest_codeword(Address x, int64_t N, int64_t stride, const std::string& dtype,
                                             Address packed, int64_t size, const Sizes& sizes, int threads,
                                             Address index, Address distance) {
    const rvqa::Rows rows = rows_at(x, N, stride, dtype);
    const py::gil_scoped_release release;
    const auto wrong = rvqa::nearest_codeword(rows, tables(packed, size, sizes), threads,
                                              at<int64_t>(index), at<float>(distance));
    return {wrong.count, wrong.first};
}

// Calls run(Sparse<Index, Count>) for the dtypes of these names.
template <class Run>
auto with_rows(Address indptr, Address indices, const std::string& index_dtype, Address data,
               const std::string& count_dtype, int64_t E, int64_t N, Run&& run) {
    const auto counted = [&](auto index, auto count) {
        using Index = decltype(index);
        using Count = decltype(count);
        const py::gil_scoped_release release;
        return run(rvqa::Sparse<Index, Count>{at<int64_t>(indptr), at<Index>(indices), at<Count>(data), E, N});
    };
    const auto indexed = [&](auto index) {
        if (count_dtype == "float32") return counted(index, float());
        if (count_dtype == "float64") return counted(index, double());
        if (count_dtype == "int32") return counted(index, int32_t());
        if (count_dtype == "uint32") return counted(index, uint32_t());
        if (count_dtype == "uint16") return counted(index, uint16_t());
        if (count_dtype == "uint8") return counted(index, uint8_t());
        throw std::invalid_argument("no counts of dtype " + count_dtype);
    };
    return index_dtype == "int64" ? indexed(int64_t()) : indexed(int32_t());
}

bool csr_project(Address indptr, Address indices, const std::string& index_dtype, Address data,
                 const std::string& count_dtype, int64_t E, int64_t N, Address weight, Address bias, int64_t G,
                 int64_t H, double target_sum, Address column_map, int64_t columns, Address library, int threads,
                 Address hidden) {
    const rvqa::Projection projection{at<float>(weight),       at<float>(bias), G, H, target_sum,
                                      at<int32_t>(column_map), columns,         at<double>(library)};
    return with_rows(indptr, indices, index_dtype, data, count_dtype, E, N, [&](const auto& rows) {
        return rvqa::csr_project(rows, projection, threads, at<float>(hidden));
    });
}

int64_t csr_totals(Address indptr, Address indices, const std::string& index_dtype, Address data,
                   const std::string& count_dtype, int64_t E, int64_t N, Address known, int64_t columns, int threads,
                   Address total) {
    return with_rows(indptr, indices, index_dtype, data, count_dtype, E, N, [&](const auto& rows) {
        return rvqa::csr_totals(rows, at<uint8_t>(known), columns, threads, at<double>(total));
    });
}

int64_t apply_span_mask(Address logits, int64_t B, int64_t V, int64_t stride, const std::string& dtype, Address states,
                        const std::string& state_dtype, Address windows, int64_t S, int threads) {
    const rvqa::Logits rows{at<void>(logits), B, V, stride, real(dtype)};
    require_aligned(logits, rows.dtype == rvqa::Real::float32 ? 4 : 2);
    const bool wide = state_dtype == "int64";
    const py::gil_scoped_release release;
    return wide ? rvqa::apply_span_mask(rows, at<int64_t>(states), at<int64_t>(windows), S, threads)
                : rvqa::apply_span_mask(rows, at<int32_t>(states), at<int64_t>(windows), S, threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native CPU kernels of rvqa; use them through rvqa.kernels.ops.";
    py::register_local_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const std::invalid_argument& invalid) {
            PyErr_SetString(py::module_::import("rvqa.errors").attr("InputError").ptr(), invalid.what());
        }
    });
    const auto release = py::call_guard<py::gil_scoped_release>();
    module.def("isa", [] { return rvqa::kernels().name; });
    module.def("packed_size", &rvqa::packed_size);
    module.def(
        "prepare",
        [](Address codebooks, int64_t M, int64_t K, int64_t D, Address packed) {
            rvqa::prepare(at<float>(codebooks), M, K, D, at<uint8_t>(packed));
        },
        release);
    module.def("residual_quantize", &residual_quantize);
    module.def("nearest_codeword", &nearest_codeword);
    module.def("residual_norms", [](Address x, int64_t N, int64_t stride, const std::string& dtype, Address codes,
                                    Address packed, int64_t size, const Sizes& sizes, int64_t levels, int threads,
                                    Address norms) {
        const rvqa::Rows rows = rows_at(x, N, stride, dtype);
        const py::gil_scoped_release unlocked;
        rvqa::residual_norms(rows, at<uint8_t>(codes), tables(packed, size, sizes), levels, threads,
                             at<float>(norms));
    });
    module.def(
        "decode",
        [](Address codes, int64_t stride, int64_t N, int64_t levels, Address codebooks, const Sizes& sizes, int threads,
           Address out) {
            return rvqa::decode(at<uint8_t>(codes), stride, N, levels, at<float>(codebooks), sizes[0], sizes[1],
                                sizes[2], threads, at<float>(out));
        },
        release);
    module.def("csr_project", &csr_project);
    module.def("csr_totals", &csr_totals);

    module.def("apply_span_mask", &apply_span_mask);

    // Only benches call these, to measure what the machine can do at best.
    module.def(
        "set_memory",
        [](Address to, int64_t bytes, int threads) {
            rvqa::parallel(bytes, 1 << 18, threads, [&](int64_t begin, int64_t end) {
                std::memset(at<char>(to) + begin, 0xFF, std::size_t(end - begin));
            });
        },
        release);
    module.def(
        "multiply_add",
        [](int64_t rounds, int threads) {
            rvqa::parallel(threads, 1, threads, [&](int64_t, int64_t) { rvqa::kernels().multiply_add(rounds); });
            return 2.0 * 16 * rvqa::kernels().lanes * double(rounds) * threads;
        },
        release);
    module.def(
        "gather_multiply_add",
        [](Address indptr, Address indices, Address values, Address weight, int64_t N, int64_t H, int threads,
           Address out) {
            rvqa::parallel(N, 64, threads, [&](int64_t begin, int64_t end) {
                rvqa::kernels().gather_multiply_add(at<int64_t>(indptr) + begin, at<int32_t>(indices),
                                                    at<float>(values), at<float>(weight), end - begin, H,
                                                    at<float>(out) + begin * H);
            });
        },
        release);
}

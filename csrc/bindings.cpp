// Python's view of the native kernels: numpy arrays in and out, the GIL released, rows split over threads. The only file
// that knows Python. Callers (kernels/cpu.py) pass valid, C-contiguous arrays of the dtypes named here.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <optional>
#include <thread>
#include <vector>

#include "cpu/csr_project.h"
#include "cpu/residual_quantize.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Calls work(first, count) on consecutive parts of N rows, one part a thread; parts below `grain` rows are not split.
template <class Work>
void split_rows(int64_t N, int64_t grain, int threads, const Work& work) {
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, N / grain));
    std::vector<std::exception_ptr> errors(parts);
    const auto part = [&](int64_t i) {
        try {
            work(N * i / parts, N * (i + 1) / parts - N * i / parts);
        } catch (...) {
            errors[i] = std::current_exception();
        }
    };
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < parts; ++i) helpers.emplace_back(part, i);
    part(0);
    for (std::thread& helper : helpers) helper.join();
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
}

rvqa::Quantizer quantizer(const Array<float>& codebooks_MKD) {
    return {codebooks_MKD.data(), codebooks_MKD.shape(0), codebooks_MKD.shape(1), codebooks_MKD.shape(2)};
}

Array<uint8_t> residual_quantize(const Array<float>& x_ND, const Array<float>& codebooks_MKD, int64_t levels,
                                 int threads) {
    const int64_t N = x_ND.shape(0), D = x_ND.shape(1);
    Array<uint8_t> codes_NM({N, levels});
    const float* x = x_ND.data();
    uint8_t* codes = codes_NM.mutable_data();
    const py::gil_scoped_release release;
    const rvqa::Quantizer tables = quantizer(codebooks_MKD);
    split_rows(N, 256, threads, [&](int64_t first, int64_t count) {
        tables.encode(x + first * D, count, levels, codes + first * levels);
    });
    return codes_NM;
}

py::tuple nearest_codeword(const Array<float>& x_ND, const Array<float>& codebooks_1KD, int threads) {
    const int64_t N = x_ND.shape(0), D = x_ND.shape(1);
    Array<int64_t> index_N(N);
    Array<float> distance_N(N);
    const float* x = x_ND.data();
    int64_t* index = index_N.mutable_data();
    float* distance = distance_N.mutable_data();
    const float* codebook = codebooks_1KD.data();
    {
        const py::gil_scoped_release release;
        const rvqa::Quantizer tables = quantizer(codebooks_1KD);
        split_rows(N, 256, threads, [&](int64_t first, int64_t count) {
            tables.encode(x + first * D, count, 1, index + first);
            rvqa::distance(x + first * D, codebook, index + first, count, D, distance + first);
        });
    }
    return py::make_tuple(index_N, distance_N);
}

Array<float> decode(const Array<uint8_t>& codes_NM, const Array<float>& codebooks_MKD, int threads) {
    const int64_t N = codes_NM.shape(0), levels = codes_NM.shape(1), K = codebooks_MKD.shape(1), D = codebooks_MKD.shape(2);
    Array<float> out_ND({N, D});
    const uint8_t* codes = codes_NM.data();
    const float* codebooks = codebooks_MKD.data();
    float* out = out_ND.mutable_data();
    const py::gil_scoped_release release;
    split_rows(N, 4096, threads, [&](int64_t first, int64_t count) {
        rvqa::decode(codes + first * levels, codebooks, count, levels, K, D, out + first * D);
    });
    return out_ND;
}

template <class Index, class Count>
Array<float> csr_project(const Array<int64_t>& indptr, const Array<Index>& indices, const Array<Count>& data,
                         const Array<float>& W_GH, const Array<float>& bias_H, double target_sum,
                         const std::optional<Array<int64_t>>& column_map,
                         const std::optional<Array<double>>& library_size, int threads) {
    const int64_t N = indptr.shape(0) - 1, H = bias_H.shape(0);
    Array<float> hidden_NH({N, H});
    float* hidden = hidden_NH.mutable_data();
    const int64_t* pointers = indptr.data();
    const Index* columns = indices.data();
    const Count* counts = data.data();
    const double* library = library_size ? library_size->data() : nullptr;
    const rvqa::Projection projection{W_GH.data(), bias_H.data(), H, target_sum,
                                      column_map ? column_map->data() : nullptr};
    const py::gil_scoped_release release;
    split_rows(N, 16, threads, [&](int64_t first, int64_t count) {
        rvqa::csr_project<Index, Count>({pointers + first, columns, counts}, library ? library + first : nullptr,
                                        projection, count, hidden + first * H);
    });
    return hidden_NH;
}

template <class Index, class Count>
void bind_csr_project(py::module_& module) {
    module.def("csr_project", &csr_project<Index, Count>, py::arg("indptr").noconvert(), py::arg("indices").noconvert(),
               py::arg("data").noconvert(), py::arg("weight").noconvert(), py::arg("bias").noconvert(),
               py::arg("target_sum"), py::arg("column_map").noconvert(), py::arg("library_size").noconvert(),
               py::arg("threads"));
}

template <class Index>
void bind_csr_project_counts(py::module_& module) {
    bind_csr_project<Index, float>(module);
    bind_csr_project<Index, double>(module);
    bind_csr_project<Index, int32_t>(module);
    bind_csr_project<Index, uint16_t>(module);
    bind_csr_project<Index, uint8_t>(module);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Native CPU kernels of rvqa; use them through rvqa.kernels.ops.";
    module.def("residual_quantize", &residual_quantize, py::arg("x").noconvert(), py::arg("codebooks").noconvert(),
               py::arg("levels"), py::arg("threads"));
    module.def("nearest_codeword", &nearest_codeword, py::arg("x").noconvert(), py::arg("codebooks").noconvert(),
               py::arg("threads"));
    module.def("decode", &decode, py::arg("codes").noconvert(), py::arg("codebooks").noconvert(), py::arg("threads"));
    bind_csr_project_counts<int32_t>(module);
    bind_csr_project_counts<int64_t>(module);
}

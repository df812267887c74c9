// The Python face of the native core.
// Import torch before this module, so that both share one OpenMP runtime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/attention.h"
#include "cpu/distill.h"
#include "cpu/prototype_linear.h"
#include "cpu/search.h"
#ifdef MOKD_CUDA
#include "cuda/distill.h"
#include "cuda/search.h"
#endif

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* compiler = "clang";
constexpr const char* compiler_version = __clang_version__;
#elif defined(__GNUC__)
constexpr const char* compiler = "gcc";
constexpr const char* compiler_version = __VERSION__;
#else
constexpr const char* compiler = "unknown";
constexpr const char* compiler_version = "";
#endif

#ifdef _OPENMP
constexpr bool openmp = true;
#else
constexpr bool openmp = false;
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler;
  info["compiler_version"] = compiler_version;
  info["cxx_standard"] = __cplusplus / 100 % 100;  // 201703L -> 17
  info["build_type"] = MOKD_FAST_BUILD_TYPE;
  info["openmp"] = openmp;
  py::list archs;  // nvcc's names: sm_ is machine code, compute_ is PTX
#ifdef MOKD_CUDA
  std::stringstream names(MOKD_CUDA);
  for (std::string name; names >> name;) archs.append(name);
#endif
  info["cuda_archs"] = archs;
  return info;
}

using mokd::Rows;
using mokd::Teacher;
using mokd::Type;

// A tensor's address as Python hands it over; 0 is none.
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Strided = std::tuple<uintptr_t, int, int64_t, int64_t>;  // address, type, image, column

Rows rows(const Strided& r) {
  return {pointer<const void>(std::get<0>(r)), Type(std::get<1>(r)), std::get<2>(r), std::get<3>(r)};
}

// Rows of one tensor [rows, B, K]: address, type, rows, strides in elements.
using Stack = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>;

template <typename F>
void each_row(const Stack& stack, const F& f) {
  const auto& [address, type, count, row, image, column] = stack;
  for (int64_t i = 0; i < count; ++i)
    f(Rows{pointer<const char>(address) + i * row * mokd::item_size(Type(type)), Type(type), image, column});
}

// One target: its rows, center and row_weight (0 is none), whether the rows are probabilities.
using Target = std::tuple<Stack, uintptr_t, uintptr_t, bool>;

// The arguments of distill_cross_entropy, kept alive for one call.
struct Distill {
  Distill(const Distill&) = delete;  // `call` points into the vectors
  std::vector<Rows> student;
  std::vector<Teacher> teacher;
  std::vector<double> pairs;
  int64_t view;                  // stride of the student's views, in elements
  bool scalars_on_host = false;  // of a call for CUDA
  mokd::cpu::Distill call;

  Distill(const Stack& student_, const std::vector<Target>& targets, std::vector<double> pairs_,
          uintptr_t scalars, int64_t images, int64_t columns, int threads)
      : pairs(std::move(pairs_)), view(std::get<3>(student_)) {
    each_row(student_, [&](const Rows& r) { student.push_back(r); });
    for (size_t i = 0; i < targets.size(); ++i) {
      const auto& [stack, center, row_weight, probabilities] = targets[i];
      const Teacher target = {{}, pointer<const void>(center), pointer<const void>(row_weight), int(i), probabilities};
      each_row(stack, [&](const Rows& r) { teacher.push_back(target), teacher.back().rows = r; });
    }
    if (student.empty() || teacher.empty() || columns < 1 || pairs.size() != teacher.size() * student.size())
      throw std::invalid_argument("Distill: at least a student row, a teacher row and a column, and "
                                  "a weight for each pair");
    call = {{images, columns, int(student.size()), int(teacher.size())},
            student.data(), teacher.data(), pointer<const void>(scalars), pairs.data(), int(targets.size()),
            threads, nullptr};
  }
};

using Map = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;  // address, type, strides

mokd::Heads heads(const Map& m) {
  return {pointer<const void>(std::get<0>(m)), Type(std::get<1>(m)),
          {std::get<2>(m), std::get<3>(m), std::get<4>(m)}};
}

struct Search : mokd::Search {};  // a type of this module alone: tests load two of them

// The arguments of feature_search (x, k, v) and joint_attention (with q, kx, vx); sizes are Q, B, H, N, d.
Search search(const std::vector<Map>& maps, const std::array<int64_t, 5>& sizes, int type, int threads) {
  if (maps.size() != 6) throw std::invalid_argument("search: six tensors, or none at an address of 0");
  if (sizes[3] < 1 || sizes[4] < 1) throw std::invalid_argument("search: at least one token and one number");
  return {{Type(type), threads, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
          heads(maps[0]), heads(maps[1]), heads(maps[2]), heads(maps[3]), heads(maps[4]), heads(maps[5])}};
}

mokd::SearchForward search_results(const std::array<uintptr_t, 5>& to) {
  return {pointer<void>(to[0]), pointer<void>(to[1]), pointer<void>(to[2]), pointer<void>(to[3]),
          pointer<void>(to[4])};
}

mokd::SearchBackward search_gradients(uintptr_t rows, uintptr_t stats, const Map& grad, const Map& grad_tokens,
                                      const std::array<uintptr_t, 6>& to) {
  return {pointer<const void>(rows), pointer<const void>(stats), heads(grad), heads(grad_tokens),
          pointer<void>(to[0]), pointer<void>(to[1]), pointer<void>(to[2]), pointer<void>(to[3]),
          pointer<void>(to[4]), pointer<void>(to[5])};
}

const mokd::cpu::Kernels& level(const std::string& name) {
  const mokd::cpu::Kernels* found = mokd::cpu::kernels(name.c_str());
  if (!found) throw std::invalid_argument("this processor cannot run the CPU kernels of level " + name);
  return *found;
}

// Crops: address, strides of crop and row. Sizes are B, H, W, C.
void augment_crops(const std::tuple<uintptr_t, int64_t, int64_t>& crops, const std::array<int64_t, 4>& sizes,
                   uintptr_t params, const std::vector<float>& scale, const std::vector<float>& shift,
                   uintptr_t out, int type, int threads, const std::string& name) {
  const int64_t channels = sizes[3];
  if ((channels != 1 && channels != 3) || int64_t(scale.size()) != channels || scale.size() != shift.size() ||
      sizes[1] < 1 || sizes[2] < 1)
    throw std::invalid_argument("augment_crops: one or three channels, a pixel and as many numbers of each");
  mokd::cpu::Augment a = {pointer<const uint8_t>(std::get<0>(crops)), std::get<1>(crops), std::get<2>(crops),
                          sizes[0], sizes[1], sizes[2], int(channels), pointer<const float>(params), {}, {},
                          Type(type), pointer<void>(out), threads};
  std::copy(scale.begin(), scale.end(), a.scale);
  std::copy(shift.begin(), shift.end(), a.shift);
  const auto& kernels = level(name);
  py::gil_scoped_release unlocked;
  kernels.augment(a);
}

// Addresses: 0 is none. Sizes are rows and width.
void bind_block(py::module_& m) {
  using Sizes = std::array<int64_t, 2>;
  m.def("gelu", [](uintptr_t u, uintptr_t g, const Sizes& sizes, int threads, const std::string& name) {
    const auto& kernels = *level(name).block;
    py::gil_scoped_release unlocked;
    kernels.gelu({sizes[0], sizes[1], threads}, pointer<const uint16_t>(u), pointer<uint16_t>(g));
  });
  m.def("gelu_backward", [](const std::array<uintptr_t, 5>& at, const Sizes& sizes, int threads,
                            const std::string& name) {
    const auto& kernels = *level(name).block;
    py::gil_scoped_release unlocked;
    kernels.gelu_backward({sizes[0], sizes[1], threads}, pointer<const uint16_t>(at[0]),
                          pointer<const uint16_t>(at[1]), pointer<uint16_t>(at[2]), pointer<uint16_t>(at[3]),
                          pointer<float>(at[4]));
  });
  m.def("sum_rows", [](uintptr_t x, uintptr_t sums, const Sizes& sizes, int threads, const std::string& name) {
    const auto& kernels = *level(name).block;
    py::gil_scoped_release unlocked;
    kernels.sum_rows({sizes[0], sizes[1], threads}, pointer<const uint16_t>(x), pointer<float>(sums));
  });
  // At x, y, weight, bias, and what comes out: sum, normed, stats.
  m.def("add_norm", [](const std::array<uintptr_t, 7>& at, int type, float eps, const std::array<int64_t, 3>& sizes,
                       int threads, const std::string& name) {
    if (type != mokd::BF16 && type != mokd::F32) throw std::invalid_argument("add_norm: y in fp32 or bf16");
    if (sizes[1] < 1 || sizes[2] < 1) throw std::invalid_argument("add_norm: at least one number and one row");
    const auto& kernels = *level(name).block;
    py::gil_scoped_release unlocked;
    kernels.add_norm({pointer<const float>(at[0]), pointer<const void>(at[1]), Type(type),
                      pointer<const float>(at[2]), pointer<const float>(at[3]), eps, sizes[0], sizes[1], sizes[2],
                      threads},
                     pointer<float>(at[4]), pointer<uint16_t>(at[5]), pointer<mokd::cpu::NormStats>(at[6]));
  });
  // At the sum, weight, stats, dsum, dnormed, and what comes out: dx, dy, dweight, dbias.
  m.def("add_norm_backward", [](const std::array<uintptr_t, 9>& at, const Sizes& sizes, int threads,
                                const std::string& name) {
    const auto& kernels = *level(name).block;
    py::gil_scoped_release unlocked;
    kernels.add_norm_backward({pointer<const float>(at[0]), nullptr, Type::F32, pointer<const float>(at[1]),
                               nullptr, 0, sizes[0], sizes[1], sizes[0], threads},
                              pointer<const mokd::cpu::NormStats>(at[2]), pointer<const float>(at[3]),
                              pointer<const uint16_t>(at[4]), pointer<float>(at[5]), pointer<uint16_t>(at[6]),
                              pointer<float>(at[7]), pointer<float>(at[8]));
  });
}

struct WeightNorm : mokd::cpu::WeightNorm {};  // a type of this module alone

// Addresses of v, g and norms; sizes are rows and width.
WeightNorm weight_norm(const std::array<uintptr_t, 3>& at, const std::array<int64_t, 2>& sizes, int type,
                       int threads) {
  if (type != mokd::BF16 && type != mokd::F16) throw std::invalid_argument("weight_norm: a type of 16 bits");
  return {{pointer<const float>(at[0]), pointer<const float>(at[1]), sizes[0], sizes[1], pointer<float>(at[2]),
           Type(type), threads}};
}

// Addresses of qkv and of stats; sizes are B, N, H, d.
mokd::cpu::Attention attention(const std::array<uintptr_t, 2>& at, const std::array<int64_t, 4>& sizes, float scale,
                               int threads) {
  if (!mokd::cpu::attention()) throw std::invalid_argument("self_attention: no products of bf16 here");
  if (sizes[1] < 1 || sizes[3] < 16 || sizes[3] % 16)
    throw std::invalid_argument("self_attention: a token at least, and heads of whole vectors");
  return {pointer<const uint16_t>(at[0]), sizes[0], sizes[1], sizes[2], sizes[3], scale, pointer<float>(at[1]),
          threads};
}

template <typename I>
struct PrototypeLinear : mokd::cpu::PrototypeLinear<I> {};  // a type of this module alone

template <typename I>
const mokd::cpu::PrototypeLinearKernels<I>& prototype_linear_kernels(const std::string& name) {
  if constexpr (std::is_same_v<I, float>) return *level(name).prototype_linear;
  else return *mokd::cpu::prototype_linear_bf16();
}

// Addresses of x, w, v, g and norms, of which w or the last three are 0; sizes are rows, prototypes and width.
template <typename I>
PrototypeLinear<I> prototype_linear(const std::array<uintptr_t, 5>& at, const std::array<int64_t, 3>& sizes,
                                    int threads) {
  if (!std::is_same_v<I, float> && !mokd::cpu::prototype_linear_bf16())
    throw std::invalid_argument("prototype_linear: this processor has no bf16 products (AVX512-BF16)");
  if (sizes[0] < 1 || sizes[1] < 1 || sizes[2] < 1 || sizes[1] % 32 || sizes[2] % 32)
    throw std::invalid_argument("prototype_linear: at least a row, prototypes and width by multiples of 32");
  return {{pointer<const I>(at[0]), sizes[0], sizes[1], sizes[2], pointer<const I>(at[1]),
           pointer<const float>(at[2]), pointer<const float>(at[3]), pointer<float>(at[4]), threads}};
}

template <typename I>
void bind_prototype_linear(py::module_& m, const char* name) {
  py::class_<PrototypeLinear<I>>(m, name)
      .def(py::init(&prototype_linear<I>))
      .def("forward",
           [](const PrototypeLinear<I>& c, uintptr_t logits, const std::string& name) {
             const auto& kernels = prototype_linear_kernels<I>(name);
             py::gil_scoped_release unlocked;
             kernels.forward(c, pointer<I>(logits));
           })
      .def("backward",  // found: the addresses of `Gradients`
           [](const PrototypeLinear<I>& c, uintptr_t grad, const std::array<uintptr_t, 4>& found,
              const std::string& name) {
             const auto& kernels = prototype_linear_kernels<I>(name);
             py::gil_scoped_release unlocked;
             kernels.backward(c, pointer<const I>(grad),
                              {pointer<float>(found[0]), pointer<float>(found[1]), pointer<float>(found[2]),
                               pointer<float>(found[3])});
           });
}

struct BatchNorm : mokd::cpu::BatchNorm {};  // a type of this module alone

// Addresses of x, weight, bias and stats; sizes are rows and channels.
BatchNorm batch_norm(const std::array<uintptr_t, 4>& at, const std::array<int64_t, 2>& sizes, int type, bool relu,
                     int threads) {
  if ((type != mokd::F32 && type != mokd::BF16) || sizes[0] < 2 || sizes[1] < 1)
    throw std::invalid_argument("batch_norm: fp32 or bf16, two rows and a channel");
  return {{pointer<const void>(at[0]), Type(type), sizes[0], sizes[1], pointer<const float>(at[1]),
           pointer<const float>(at[2]), pointer<float>(at[3]), relu, threads}};
}

#ifdef MOKD_CUDA
namespace cuda = mokd::cuda;

cuda::Plan plan(const Distill& d, int tile) { return cuda::plan(d.call.shape, d.student.front().type, tile); }

cuda::Call cuda_call(const Distill& d) {
  if (d.student.size() > cuda::VIEWS || d.teacher.size() > cuda::TEACHERS || d.pairs.size() > cuda::PAIRS ||
      d.call.targets > cuda::TEACHERS)
    throw std::invalid_argument("more rows or pairs than a CUDA kernel takes");
  const Rows& first = d.student.front();
  cuda::Call call = {d.call.shape, d.call.scalars, {}, d.call.targets, first, d.view, {}, {}};
  if (d.scalars_on_host) {
    for (int i = 0; i < 1 + 2 * call.targets; ++i)
      call.numbers[i] = first.type == mokd::F64 ? static_cast<const double*>(call.scalars)[i]
                                                : static_cast<const float*>(call.scalars)[i];
    call.scalars = nullptr;
  }
  std::copy(d.teacher.begin(), d.teacher.end(), call.teacher);
  std::copy(d.pairs.begin(), d.pairs.end(), call.pairs);
  return call;
}

void cuda_forward(const Distill& d, uintptr_t states, uintptr_t joined, int tile, int device, uintptr_t stream) {
  py::gil_scoped_release unlocked;
  cuda::forward(cuda_call(d), pointer<void>(states), pointer<unsigned>(joined), plan(d, tile), {device, pointer<void>(stream)});
}

void cuda_finish(const Distill& d, uintptr_t stats, uintptr_t terms, uintptr_t loss, uintptr_t states,
                 int64_t tiles, uintptr_t image_terms, uintptr_t joined, int device, uintptr_t stream) {
  py::gil_scoped_release unlocked;
  cuda::finish(cuda_call(d), {pointer<void>(stats), pointer<void>(terms), pointer<void>(loss)},
               pointer<void>(states), tiles, pointer<double>(image_terms), pointer<unsigned>(joined), {device, pointer<void>(stream)});
}

void cuda_backward(const Distill& d, uintptr_t stats, uintptr_t grad, uintptr_t out, int tile, int device,
                   uintptr_t stream) {
  py::gil_scoped_release unlocked;
  cuda::backward(cuda_call(d), {pointer<const void>(stats), pointer<const void>(grad), pointer<void>(out), false},
                 plan(d, tile), {device, pointer<void>(stream)});
}

void bind_cuda(py::module_& m, py::class_<Distill>& distill) {
  m.attr("CUDA_CAPACITY") = py::make_tuple(cuda::VIEWS, cuda::TEACHERS, cuda::PAIRS);
  m.def("cuda_versions", [] { return py::make_tuple(cuda::driver_version(), cuda::built_version()); },
        "CUDA that the driver takes (0 without one) and CUDA built with: 1000 * major + 10 * minor.");
  distill.def_readwrite("scalars_on_host", &Distill::scalars_on_host, "They are read at each launch.")
      .def("cuda_forward", &cuda_forward)
      .def("cuda_finish", &cuda_finish)
      .def("cuda_backward", &cuda_backward)
      .def("cuda_plan", [](const Distill& d, int tile) {
        const cuda::Plan p = plan(d, tile);
        return py::make_tuple(p.warps, mokd::tiles(d.call.shape, p.tile));
      }, "Warps of a block, and tiles of an image.");
}

void bind_cuda_search(py::class_<Search>& search_call) {
  search_call
      .def("cuda_forward",
           [](const Search& s, const std::array<uintptr_t, 5>& to, int device, uintptr_t stream) {
             py::gil_scoped_release unlocked;
             cuda::forward(s, search_results(to), {device, pointer<void>(stream)});
           })
      .def("cuda_backward",
           [](const Search& s, uintptr_t rows, uintptr_t stats, const Map& grad, const Map& grad_tokens,
              const std::array<uintptr_t, 6>& to, uintptr_t out, uintptr_t delta, int device, uintptr_t stream) {
             py::gil_scoped_release unlocked;
             cuda::backward(s, search_gradients(rows, stats, grad, grad_tokens, to), pointer<void>(out),
                            pointer<void>(delta), {device, pointer<void>(stream)});
           });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of mokd_fast.";
  m.def("build_info", &build_info,
        "How this module was built: compiler and version, C++ standard, type, OpenMP, CUDA archs.");
  m.def("cpu_level", [](const std::string& name) { return level(name).level; }, py::arg("name") = "",
        "The x86-64 level whose kernels run (baseline, v3 or v4); ValueError if `name` cannot.");
  m.def("column_mean",
        [](const Strided& row, int64_t count, int64_t columns, uintptr_t mean, int threads,
           const std::string& name) {
          const auto& kernels = level(name);
          py::gil_scoped_release unlocked;
          kernels.column_mean({rows(row), count, columns, pointer<void>(mean), threads});
        });
  m.def("augment_crops", &augment_crops);
  bind_block(m);
  py::class_<WeightNorm>(m, "WeightNorm")
      .def(py::init(&weight_norm))
      .def("forward",
           [](const WeightNorm& c, uintptr_t w, const std::string& name) {
             const auto& kernels = *level(name).prototypes;
             py::gil_scoped_release unlocked;
             kernels.weight_norm(c, pointer<void>(w));
           })
      .def("backward",
           [](const WeightNorm& c, uintptr_t grad, uintptr_t for_v, uintptr_t for_g, const std::string& name) {
             const auto& kernels = *level(name).prototypes;
             py::gil_scoped_release unlocked;
             kernels.weight_norm_backward(c, pointer<const void>(grad), pointer<float>(for_v),
                                          pointer<float>(for_g));
           });
  m.def("has_bf16", [] { return mokd::cpu::attention() != nullptr; },
        "Whether this processor has products of bf16, and the compiler of this module had.");
  bind_prototype_linear<float>(m, "PrototypeLinearFp32");
  bind_prototype_linear<uint16_t>(m, "PrototypeLinearBf16");
  py::class_<BatchNorm>(m, "BatchNorm")
      .def(py::init(&batch_norm))
      .def("forward",
           [](const BatchNorm& c, double eps, uintptr_t added, uintptr_t y, const std::string& name) {
             const auto& kernels = *level(name).batch_norm;
             py::gil_scoped_release unlocked;
             kernels.forward(c, eps, pointer<const void>(added), pointer<void>(y));
           })
      .def("backward",  // addresses of y, masked, dx and the gradients of weight and bias
           [](const BatchNorm& c, uintptr_t grad, const std::array<uintptr_t, 5>& to, const std::string& name) {
             const auto& kernels = *level(name).batch_norm;
             py::gil_scoped_release unlocked;
             kernels.backward(c, {pointer<const void>(grad), pointer<const void>(to[0]), pointer<void>(to[1]),
                                  pointer<void>(to[2]), pointer<float>(to[3]), pointer<float>(to[4])});
           });
  m.def("clip",
        [](const std::vector<uintptr_t>& grads, const std::vector<int64_t>& sizes, float max_norm, uintptr_t norms,
           bool known, int threads, const std::string& name) {
          if (grads.size() != sizes.size()) throw std::invalid_argument("clip: lists of one length");
          std::vector<float*> at;
          for (uintptr_t grad : grads) at.push_back(pointer<float>(grad));
          const auto& kernels = level(name);
          py::gil_scoped_release unlocked;
          kernels.clip({at.data(), sizes.data(), int64_t(at.size()), max_norm, pointer<float>(norms), known, threads});
        });
  m.def("update",  // a tensor: its size, seven addresses in the order of `Moved`, its group
        [](const std::vector<std::array<int64_t, 9>>& tensors, const std::vector<std::array<double, 5>>& groups,
           float max_norm, uintptr_t skip, uintptr_t momentum, int threads, const std::string& name) {
          std::vector<mokd::cpu::Moved> moved;
          for (const auto& t : tensors) {
            if (t[8] != -1 && !(0 <= t[8] && t[8] < int64_t(groups.size())))
              throw std::invalid_argument("update: a tensor of no group");
            moved.push_back({t[0], pointer<float>(t[1]), pointer<const float>(t[2]), pointer<float>(t[3]),
                             pointer<float>(t[4]), pointer<float>(t[5]), pointer<float>(t[6]),
                             pointer<const float>(t[7]), t[8]});
          }
          std::vector<mokd::cpu::Group> of;
          for (const auto& g : groups) of.push_back({g[0], g[1], g[2], g[3], g[4]});
          const auto& kernels = level(name);
          py::gil_scoped_release unlocked;
          kernels.update({moved.data(), int64_t(moved.size()), of.data(), max_norm, pointer<const bool>(skip),
                          pointer<const double>(momentum), threads});
        });
  m.def("matvec",
        [](uintptr_t matrix, int type, const std::array<int64_t, 2>& sizes, uintptr_t vector, uintptr_t found,
           int threads, const std::string& name) {
          const auto& kernels = *level(name).prototypes;
          py::gil_scoped_release unlocked;
          kernels.matvec({pointer<const void>(matrix), Type(type), sizes[0], sizes[1],
                          pointer<const float>(vector), pointer<float>(found), threads});
        });
  m.def("attention", [](const std::array<uintptr_t, 2>& at, const std::array<int64_t, 4>& sizes, float scale,
                        int threads, uintptr_t out) {
    const auto call = attention(at, sizes, scale, threads);
    py::gil_scoped_release unlocked;
    mokd::cpu::attention()->forward(call, pointer<uint16_t>(out));
  });
  m.def("attention_backward", [](const std::array<uintptr_t, 2>& at, const std::array<int64_t, 4>& sizes, float scale,
                                 int threads, uintptr_t out, uintptr_t grad, uintptr_t for_qkv) {
    const auto call = attention(at, sizes, scale, threads);
    py::gil_scoped_release unlocked;
    mokd::cpu::attention()->backward(call, pointer<const uint16_t>(out), pointer<const uint16_t>(grad),
                                     pointer<uint16_t>(for_qkv));
  });
  py::class_<Search> search_call(m, "Search");
  search_call.def(py::init(&search))
      .def("forward",
           [](const Search& s, const std::array<uintptr_t, 5>& to, const std::string& name) {
             const auto& kernels = *level(name).search;
             py::gil_scoped_release unlocked;
             kernels.forward(s, search_results(to));
           })
      .def("backward",
           [](const Search& s, uintptr_t rows, uintptr_t stats, const Map& grad, const Map& grad_tokens,
              const std::array<uintptr_t, 6>& to, const std::string& name) {
             const auto& kernels = *level(name).search;
             py::gil_scoped_release unlocked;
             kernels.backward(s, search_gradients(rows, stats, grad, grad_tokens, to));
           });
  py::class_<Distill> distill(m, "Distill");
  distill
      .def(py::init<const Stack&, const std::vector<Target>&, std::vector<double>, uintptr_t, int64_t, int64_t,
                    int>())
      .def("state_size", [](const Distill& d) { return mokd::state_size(d.call.shape); },
           "fp64 numbers an image that `running` holds.")
      .def("forward",
           [](const Distill& d, uintptr_t stats, uintptr_t terms, uintptr_t loss, const std::string& name,
              uintptr_t running, bool first, bool last, uintptr_t mean) {
             const auto& kernels = level(name);
             mokd::cpu::Distill call = d.call;
             call.mean = pointer<void>(mean);
             py::gil_scoped_release unlocked;
             kernels.forward(call, {pointer<void>(stats), pointer<void>(terms), pointer<void>(loss)},
                             pointer<double>(running), {first, last});
           },
           py::arg("stats"), py::arg("terms"), py::arg("loss"), py::arg("level"), py::arg("running") = 0,
           py::arg("first") = true, py::arg("last") = true, py::arg("mean") = 0)
      .def("backward",
           [](const Distill& d, uintptr_t stats, uintptr_t grad, uintptr_t out, const std::string& name,
              bool reused) {
             const auto& kernels = level(name);
             py::gil_scoped_release unlocked;
             kernels.backward(d.call, {pointer<const void>(stats), pointer<const void>(grad),
                                       pointer<void>(out), reused});
           },
           py::arg("stats"), py::arg("grad"), py::arg("out"), py::arg("level"), py::arg("reused") = false);
#ifdef MOKD_CUDA
  bind_cuda(m, distill);
  bind_cuda_search(search_call);
#endif
}

// The Python face of the native core.
// Import torch before this module, so that both share one OpenMP runtime.
#include <pybind11/pybind11.h>

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
  info["cuda_archs"] = py::list();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of mokd_fast.";
  m.def("build_info", &build_info,
        "How this module was built: compiler and version, C++ standard, type, OpenMP, CUDA archs.");
}

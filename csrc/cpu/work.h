// Memory and threads of a call, and the names of a level. Included by each kernel file, whose functions
// have internal linkage: each x86-64 level compiles its own.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif

#define MOKD_JOIN_(a, b) a##b
#define MOKD_JOIN(a, b) MOKD_JOIN_(a, b)
#define MOKD_STRING_(a) #a
#define MOKD_STRING(a) MOKD_STRING_(a)

namespace mokd::cpu {
namespace {

// Memory of one call, aligned to cache lines; std::bad_alloc, which reaches Python as MemoryError.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : at(std::aligned_alloc(64, (bytes / 64 + 1) * 64)) {
    if (!at) throw std::bad_alloc();
  }
  ~Buffer() { std::free(at); }
  Buffer(const Buffer&) = delete;
  char* get() const { return static_cast<char*>(at); }

 private:
  void* at;
};

// Calls work(item, number of the thread) for every item, neighbours by one thread: it fetches across
// their border. No parallel region for one thread: a forked child would hang in one.
template <typename Work>
void parallel(int threads, int64_t items, const Work& work) {
#ifdef _OPENMP
  if (threads > 1 && items > 1) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < items; ++i) work(i, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t i = 0; i < items; ++i) work(i, 0);
}

}  // namespace
}  // namespace mokd::cpu

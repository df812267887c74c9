// Runs the CUDA kernels on a host, block after block: a thread is a coroutine, a barrier and a shuffle
// hand over to the next one. It proves indices and arithmetic, not speed. Shared memory starts as NaN,
// that past a block's own must stay so, and MOKD_EMULATE_REVERSED=1 runs the blocks and the threads of
// each in the other order: a race changes bits.
#pragma once
#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__

namespace mokd::cuda {

alignas(16) inline uint4 shared[(48 << 10) / sizeof(uint4)];

namespace emulator {

constexpr size_t STACK = 64 << 10;

struct Thread {
  ucontext_t start;
  jmp_buf here;  // jumps from then on: swapcontext makes a system call each time
  std::unique_ptr<char[]> stack;
  double slot[2];  // what a shuffle passes on; two in turn, so that one barrier is enough
  int shuffles = 0, barriers = 0;
  bool started = false, done = false;
};

inline std::vector<Thread> threads;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline dim3 thread_index, block_index, block_size, grid_size;

inline Thread& self() { return threads[thread_index.x]; }

// Waits until threads [first, first + count) have come here as often as this one.
inline void barrier(int Thread::*arrived, unsigned first, unsigned count) {
  const int mine = ++(self().*arrived);
  for (unsigned i = first; i < first + count; ++i)
    while (threads[i].*arrived < mine) {
      if (threads[i].done) throw std::logic_error("a thread left before a barrier");
      if (!_setjmp(self().here)) _longjmp(scheduler, 1);
    }
}

inline void entry() {
  body();
  self().done = true;
  _longjmp(scheduler, 1);
}

[[gnu::noinline]] inline void resume(Thread& thread) {
  if (_setjmp(scheduler)) return;
  if (thread.started) _longjmp(thread.here, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline void run_block(unsigned count, size_t bytes, bool reversed) {
  std::memset(shared, 0xff, sizeof(shared));
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.shuffles = thread.barriers = 0;
    thread.started = thread.done = false;
    getcontext(&thread.start);
    thread.start.uc_stack = {thread.stack.get(), 0, STACK};
    makecontext(&thread.start, entry, 0);
  }
  for (bool waiting = true; waiting;) {
    waiting = false;
    for (unsigned i = 0; i < count; ++i) {
      thread_index.x = reversed ? count - 1 - i : i;
      if (self().done) continue;
      waiting = true;
      resume(self());
    }
  }
  const auto* all = reinterpret_cast<const unsigned char*>(shared);
  if (std::any_of(all + bytes, all + sizeof(shared), [](unsigned char x) { return x != 0xff; }))
    throw std::logic_error("a block wrote past its shared memory");
}

template <typename T>
T shuffle(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(double));
  const int turn = self().shuffles % 2;
  const unsigned warp = thread_index.x / 32 * 32, from = lane < 32 ? lane : thread_index.x % 32;
  std::memcpy(&self().slot[turn], &value, sizeof(T));
  barrier(&Thread::shuffles, warp, 32);
  std::memcpy(&value, &threads[warp + from].slot[turn], sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx ::mokd::cuda::emulator::thread_index
#define blockIdx ::mokd::cuda::emulator::block_index
#define blockDim ::mokd::cuda::emulator::block_size
#define gridDim ::mokd::cuda::emulator::grid_size

inline void __syncthreads() { emulator::barrier(&emulator::Thread::barriers, 0, emulator::block_size.x); }
inline void __threadfence() {}  // one thread runs at a time
inline unsigned atomicAdd(unsigned* at, unsigned x) {
  const unsigned before = *at;
  *at += x;
  return before;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, threadIdx.x % 32 ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  return emulator::shuffle(value, threadIdx.x % 32 + delta);
}

inline int __reduce_max_sync(unsigned mask, int value) {
  for (int i = 16; i; i /= 2) value = std::max(value, __shfl_xor_sync(mask, value, i));
  return value;
}

struct OnDevice {
  explicit OnDevice(int device) {
    if (device) throw std::runtime_error("CUDA: invalid device ordinal");  // one device, number 0
  }
};

template <typename P>
void launch(void (*kernel)(P), int64_t blocks, int count, size_t bytes, void*, const P& parameters) {
  using namespace emulator;
  if (bytes > sizeof(shared)) throw std::runtime_error("CUDA: too much shared memory");
  block_size.x = count;
  grid_size.x = unsigned(blocks);
  while (int(threads.size()) < count) {
    threads.emplace_back();
    threads.back().stack.reset(new char[STACK]);
  }
  body = [&] { kernel(parameters); };
  const bool reversed = std::getenv("MOKD_EMULATE_REVERSED") != nullptr;
  for (int64_t i = 0; i < blocks; ++i) {
    block_index.x = reversed ? blocks - 1 - i : i;
    run_block(count, bytes, reversed);
  }
}

inline void check(int) {}

}  // namespace mokd::cuda

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// What every x86-64 level of the CPU kernel offers; see distill.cpp.
#pragma once
#include "../core/distill.h"
#include "augment.h"
#include "batch_norm.h"
#include "block.h"
#include "clip.h"
#include "prototype_linear.h"
#include "prototypes.h"
#include "search.h"
#include "update.h"

namespace mokd::cpu {

struct Distill {
  Shape shape;
  const Rows* student;         // [V]
  const Teacher* teacher;      // [T]
  const void* scalars;         // [1 + 2 targets] of the arithmetic's type: temperatures, weights
  const double* pairs;         // [T, V]
  int targets;
  int threads;
  void* mean;  // of forward: [K] of the arithmetic's type, the mean of all teacher rows as they are; or null
};

// mean [K] over `count` rows, row i being image i of `rows`; of the arithmetic's type.
struct ColumnMean {
  Rows rows;
  int64_t count, columns;
  void* mean;
  int threads;
};

struct Kernels {
  const char* level;
  // All columns at once or, with `running`, a chunk of them: `running` [B, state_size] (core/distill.h)
  // goes from one to the next, and the last writes what `Forward` asks for.
  void (*forward)(const Distill&, const Forward&, double* running, Chunk);
  void (*backward)(const Distill&, const Backward&);
  void (*column_mean)(const ColumnMean&);
  const SearchKernels* search;
  void (*augment)(const Augment&);
  const PrototypeKernels* prototypes;
  const PrototypeLinearKernels<float>* prototype_linear;
  void (*clip)(const Clip&);
  void (*update)(const Update&);
  const BatchNormKernels* batch_norm;
  const BlockKernels* block;
};

// The kernels of the best level this processor runs, or of the one called `forced`; null when that
// one is unknown or cannot run here.
const Kernels* kernels(const char* forced);

}  // namespace mokd::cpu

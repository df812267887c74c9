// What every x86-64 level of the CPU kernel offers; see distill.cpp.
#pragma once
#include "../core/distill.h"

namespace mokd::cpu {

struct Distill {
  Shape shape;
  const Rows* student;         // [V]
  const Teacher* teacher;      // [T]
  const void* temperatures;    // [1 + targets] of the arithmetic's type: student, each target
  const double* pairs;         // [T, V]
  const double* weights;       // [targets]
  int targets;
  int threads;
};

// stats [V + T, B, 2] of the arithmetic's type: maximum of the logits (of a teacher less the centre)
// and log-sum (student) or sum (teacher) of exp((logit - maximum) / temperature); terms [targets] and loss [1], of the arithmetic's type.
struct Forward {
  void* stats;
  void* terms;
  void* loss;
};

// gradient [V, B, K] contiguous, of the student's type; grad_output and stats as above.
struct Backward {
  const void* stats;
  const void* grad_output;
  void* gradient;
};

struct Kernels {
  const char* level;
  void (*forward)(const Distill&, const Forward&);
  void (*backward)(const Distill&, const Backward&);
};

// The kernels of the best level this processor runs, or of the one called `forced`; null when that
// one is unknown or cannot run here.
const Kernels* kernels(const char* forced);

}  // namespace mokd::cpu

// What every x86-64 level offers for the end of a step; see update.cpp.
#pragma once
#include <cstdint>

namespace mokd::cpu {

// One tensor of a model.
struct Moved {
  int64_t size;
  float* weight;
  const float* grad;    // or null, where there is no group
  float* first;         // momentum of SGD, or null; the first moment of AdamW
  float* second;        // its second moment; null for SGD
  float* step;          // its steps up to now; null for SGD
  float* teacher;       // or null
  const float* norm;    // of the gradient, or null
  int64_t group;        // its numbers in Update::groups; -1: it stays, and its teacher alone follows
};

struct Group {
  double rate, decay;
  double first, second;  // momentum of SGD, or both betas
  double eps;
};

struct Update {
  const Moved* tensors;
  int64_t count;
  const Group* groups;
  float max_norm;
  const bool* skip;        // or null; set: no weight and no moment moves
  const double* momentum;  // of the teacher
  int threads;
};

}  // namespace mokd::cpu

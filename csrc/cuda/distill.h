// distill_cross_entropy on CUDA: what the bindings call. Nothing here needs a GPU but forward and
// backward. See distill.cu.
#pragma once
#include "../core/distill.h"

namespace mokd::cuda {

// The rows and pairs of a call travel as a kernel parameter: no copy, no synchronisation, and a CUDA
// graph keeps them. A kernel takes 4 KB of parameters everywhere, hence the capacity.
constexpr int VIEWS = 24, TEACHERS = 24, PAIRS = 192;

struct Call {
  Shape shape;
  const void* scalars;  // on the device, as are the centers and row weights of the teachers
  int targets;
  Rows student[VIEWS];
  Teacher teacher[TEACHERS];
  double pairs[PAIRS];
};

// How the columns are cut: a warp works on `tile` columns of one image, `warps` of them in a block.
struct Plan {
  int tile, warps;
};

// A tile of 256, 512 or, but for fp64, 1024 columns (kernels/configs.py chooses);
// std::invalid_argument for another one, or too many teacher rows for it.
Plan plan(const Shape& shape, Type student, int tile);

// All only launch kernels on `stream` of `device`; std::runtime_error when CUDA refuses.
struct Place {
  int device;
  void* stream;
};
// The state of every tile of the call's columns, to states [B, tiles, state_size]. The columns of a row
// may come in several calls, each with states of its own.
void forward(const Call& call, double* states, const Plan& plan, Place place);
// The results, from the states [B, tiles, state_size] of all columns; image_terms [targets, B] is
// workspace. What the call says of columns does not matter here.
void finish(const Call& call, const Forward& io, double* states, int64_t tiles, double* image_terms,
            Place place);
void backward(const Call& call, const Backward& io, const Plan& plan, Place place);

// Version of the CUDA that the driver takes and of the one built with, as 1000 * major + 10 * minor.
int driver_version();
int built_version();

}  // namespace mokd::cuda

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
  const void* scalars;  // on the device, as are the centers and row weights of the teachers; or null:
  double numbers[1 + 2 * TEACHERS];  // then they are these
  int targets;
  Rows student;  // view 0; the others follow at `view` elements each
  int64_t view;
  Teacher teacher[TEACHERS];
  double pairs[PAIRS];
};

template <typename A>
static MOKD_HOST_DEVICE inline A scalar(const Call& d, int i) {
  return d.scalars ? static_cast<const A*>(d.scalars)[i] : A(d.numbers[i]);
}

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
// The state of every tile of the call's columns, to states [B, state_size, tiles] of the arithmetic's
// type. The columns of a row may come in several calls, each with states of its own.
// Sets `joined` to 0.
void forward(const Call& call, void* states, unsigned* joined, const Plan& plan, Place place);
// The results, from the states [B, state_size, tiles] of all columns; image_terms [targets, B] is
// workspace, and `joined` what forward set to 0. What the call says of columns does not matter here.
void finish(const Call& call, const Forward& io, void* states, int64_t tiles, double* image_terms,
            unsigned* joined, Place place);
void backward(const Call& call, const Backward& io, const Plan& plan, Place place);

// Version of the CUDA that the driver takes and of the one built with, as 1000 * major + 10 * minor.
int driver_version();
int built_version();

}  // namespace mokd::cuda

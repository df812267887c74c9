// The feature search on CUDA: what the bindings call. See search.cu.
#pragma once
#include "../core/search.h"
#include "distill.h"

namespace mokd::cuda {

void forward(const Search& search, const SearchForward& io, Place place);
// out [B, M, H, d] and delta [B, M, H], of the arithmetic's type, are workspace.
void backward(const Search& search, const SearchBackward& io, void* out, void* delta, Place place);

}  // namespace mokd::cuda

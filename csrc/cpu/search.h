// What every x86-64 level of the feature search offers; see search.cpp.
#pragma once
#include "../core/search.h"

namespace mokd::cpu {

struct SearchKernels {
  void (*forward)(const Search&, const SearchForward&);
  void (*backward)(const Search&, const SearchBackward&);
};

}  // namespace mokd::cpu

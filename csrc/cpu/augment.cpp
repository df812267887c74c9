// augment_crops on the CPU: what it does stands in mokd_fast/ops/augment.py, and bit for bit in
// mokd_fast/ops/reference.py. Compiled once for every x86-64 level, as distill.cpp, without contraction of
// a * b + c: Pillow has none, and cuts fractions off where another rounding shows.
//
// A crop is one piece of work: the thread count changes no bit. Its channels are taken apart once, to
// planes of bytes (150 kB for 224 x 224: they stay in L2), and each pass runs over a row in L1:
//   1. what comes before contrast, and the sum of the luma    (only with contrast)
//   2. the rest of the colour; then, without blur, normalise, put together, cast, write
//   3. with blur: a row is blurred along itself to one of 2 R + 1 lines, and when the last of its
//      neighbours is there, across them; then as in 2.
// Memory moved: 3 bytes a pixel in, 3 numbers out.
#include "augment.h"

#include <algorithm>
#include <cmath>

#include "pixels.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int L = LANES<float>;
constexpr int64_t STEP = 32;          // planes are padded to: two vectors of the widest level
constexpr float SIGMA_MAX = 100;      // as in reference.py
constexpr int RADIUS = 300;           // of that

enum Op { BRIGHTNESS, CONTRAST, SATURATION, HUE, LUMA };

struct Step {
  int op;
  float factor;  // of a hue: the shift
  float flat;    // what contrast turns about
};

// What is done to a crop.
struct Plan {
  Step steps[5];
  int count = 0, contrast = -1;  // its place in the steps
  bool flip, solarize;
  int radius = 0;
  float taps[RADIUS + 1];  // from the middle outwards

  Plan(const float* row, int channels) : flip(row[FLIP] > 0), solarize(row[SOLARIZE] > 0) {
    bool seen[4] = {};
    for (int i = 0; i < 4; ++i) {
      const float code = row[ORDER + i];
      if (!(code > -1 && code < 4) || seen[int(code)]) continue;
      seen[int(code)] = true;
      if (channels == 3 || code < SATURATION) add(int(code), row[FACTORS + int(code)]);
    }
    if (channels == 3 && row[GREY] > 0) steps[count++] = {LUMA, 0, 0};
    if (row[SIGMA] > 0) gaussian(std::min(row[SIGMA], SIGMA_MAX));
  }

  void add(int op, float factor) {
    if (op == HUE ? factor == 0 : factor == 1) return;  // neutral
    if (op == CONTRAST) contrast = count;
    if (op == HUE) factor = float(std::trunc(std::clamp(factor, -0.5f, 0.5f) * 255.0));
    steps[count++] = {op, factor, 0};
  }

  void gaussian(double sigma) {
    radius = int(std::ceil(3 * sigma));
    double tap[RADIUS + 1], sum = -1;
    for (int j = 0; j <= radius; ++j) sum += 2 * (tap[j] = std::exp(-0.5 * (j / sigma) * (j / sigma)));
    for (int j = 0; j <= radius; ++j) taps[j] = float(tap[j] / sum);
  }
};

inline Floats luma(const Floats* x) {
  return whole((x[0] * 19595.0f + x[1] * 38470.0f + x[2] * 7471.0f + 32768.0f) * (1 / 65536.0f));
}

inline Floats blend(Floats flat, Floats x, float factor) {
  return whole(at_most(255, at_least(0, flat + (x - flat) * factor)));
}

// There and back through HSV in bytes; reference.py says how.
inline void shift_hue(Floats* x, float shift) {
  const Floats r = x[0], g = x[1], b = x[2];
  const Floats v = larger(larger(r, g), b), low = smaller(smaller(r, g), b), chroma = v - low;
  const Floats part = (v + v + low - r - g - b) / at_least(1, chroma);
  const Floats blue = g == low ? 5 - part : 3 + part, green = r == low ? 3 - part : 1 + part;
  const Floats red = b == low ? 1 - part : part - 1;
  Floats hue = (r == v ? red : g == v ? green : blue) / 6;
  hue = whole((hue < 0 ? hue + 1 : hue) * 255) + shift;
  hue = hue < 0 ? hue + 256 : hue;
  hue = (hue >= 256 ? hue - 256 : hue) * 6;
  const Floats fall = whole(chroma / at_least(1, v) * 255) * v;
  const Floats w[3] = {510 - absolute(hue - 765), absolute(hue - 510) - 255, absolute(hue - 1020) - 255};
  for (int c = 0; c < 3; ++c)
    x[c] = v - whole(at_most(255, at_least(0, w[c])) * fall * (1 / 65025.0f) + 0.5f);
}

template <int C>
inline void apply(const Step& step, Floats* x) {
  if (step.op <= CONTRAST) {
    for (int c = 0; c < C; ++c) x[c] = blend(Floats{} + step.flat, x[c], step.factor);
  } else if constexpr (C == 3) {
    if (step.op == HUE) return shift_hue(x, step.factor);
    const Floats grey = luma(x);
    for (int c = 0; c < C; ++c) x[c] = step.op == LUMA ? grey : blend(grey, x[c], step.factor);
  }
}

// The planes of one row.
template <int C, typename T>
struct Planes {
  T* at;
  int64_t apart;
  void get(int64_t i, Floats* x) const {
    for (int c = 0; c < C; ++c) x[c] = floats(at + c * apart + i);
  }
};

template <int C>
void colour(const Planes<C, uint8_t>& row, const Step* begin, const Step* end) {
  if (begin == end) return;
  for (int64_t i = 0; i < row.apart; i += L) {
    Floats x[C];
    row.get(i, x);
    for (const Step* step = begin; step != end; ++step) apply<C>(*step, x);
    for (int c = 0; c < C; ++c) put_bytes(row.at + c * row.apart + i, x[c]);
  }
}

// What lies beyond the row is 0, and 0 it is after brightness, saturation and hue.
template <int C>
double sum_of_luma(const Planes<C, uint8_t>& row) {
  double total = 0;
  for (int64_t i = 0; i < row.apart;) {
    Floats sum = {};
    for (const int64_t end = std::min(row.apart, i + 4096 * L); i < end; i += L) {  // below 2^24: exact
      Floats x[C];
      row.get(i, x);
      sum += C == 3 ? luma(x) : x[0];
    }
    total += reduce_add<float>(sum);
  }
  return total;
}

// A row to its place: solarized, normalised, cast.
template <int C, typename T>
void finish(const Augment& a, const Planes<C, T>& row, bool solarize, float* wide, int64_t pixel) {
  for (int64_t i = 0; i < row.apart; i += L) {
    Floats x[C];
    row.get(i, x);
    for (int c = 0; c < C; ++c) {
      if (sizeof(T) == 4) x[c] = whole(x[c] + 0.5f);
      if (solarize) x[c] = x[c] >= 128 ? 255 - x[c] : x[c];
      x[c] = x[c] * a.scale[c] + a.shift[c];
    }
    put_interleaved<C>(wide + i * C, x);
  }
  const int64_t bytes = item_size(a.type) * C;
  narrow(a.type, a.width * C, wide);
  stream(static_cast<char*>(a.out) + pixel * bytes, wide, a.width * bytes);
}

// to[i] = sum over j from -R to R of taps[|j|] near[j][i], for whole STEPs of n.
void convolve(const Plan& plan, int64_t n, const float* const* near, float* to) {
  for (int64_t i = 0; i < n; i += STEP) {
    Floats sum[STEP / L];
    for (int u = 0; u < STEP / L; ++u) sum[u] = floats(near[0] + i + u * L) * plan.taps[0];
    for (int j = 1; j <= plan.radius; ++j) {
      const float *before = near[-j] + i, *after = near[j] + i;
      for (int u = 0; u < STEP / L; ++u)
        sum[u] = multiply_add(floats(before + u * L) + floats(after + u * L), plan.taps[j], sum[u]);
    }
    for (int u = 0; u < STEP / L; ++u) store(to + i + u * L, sum[u]);
  }
}

// Along a row; beyond its edges their pixels go on.
template <int C>
void blur_along(const Plan& plan, const Planes<C, uint8_t>& row, int64_t width, float* wide, float* to) {
  const float* near[2 * RADIUS + 1];
  for (int j = -plan.radius; j <= plan.radius; ++j) near[RADIUS + j] = wide + plan.radius + j;
  for (int c = 0; c < C; ++c) {
    const uint8_t* from = row.at + c * row.apart;
    float* middle = wide + plan.radius;
    for (int64_t i = 0; i < width; i += L) store(middle + i, floats(from + i));
    for (int64_t i = 0; i < plan.radius; ++i) wide[i] = from[0], middle[width + i] = from[width - 1];
    convolve(plan, row.apart, near + RADIUS, to + c * row.apart);
  }
}

// Where one thread works: the planes of a crop, a row of floats, lines of blurred ones.
struct Place {
  uint8_t* bytes;
  float *wide, *lines, *out;
};

// The sizes of a call: of a plane's row, and of each part of a Place for the largest radius.
struct Sizes {
  int64_t padded, bytes, wide, lines, out;
  Sizes(const Augment& a, int radius) {
    padded = (a.width + STEP - 1) / STEP * STEP;
    bytes = a.height * a.channels * padded;
    wide = (padded * a.channels + 2 * radius + 2 * STEP) / STEP * STEP;  // and so all begin in a cache line
    lines = radius ? (2 * radius + 1) * a.channels * padded : 0;
    out = a.channels * padded;
  }
  int64_t total() const { return (bytes + (wide + lines + out) * int64_t(sizeof(float)) + 63) / 64 * 64; }
};

template <int C>
struct Crop {
  const Augment& a;
  const Sizes& size;
  const Place& place;
  Plan& plan;
  int64_t index;

  Planes<C, uint8_t> row(int64_t y) const { return {place.bytes + y * C * size.padded, size.padded}; }

  void run() {
    const uint8_t* from = a.crops + index * a.crop_stride;
    Step *early = plan.steps, *late = early + std::max(plan.contrast, 0), *end = early + plan.count;
    double sum = 0;
    for (int64_t y = 0; y < a.height; ++y) {
      take_apart<C>(from + y * a.row_stride, a.width, plan.flip, row(y).at, size.padded);
      if (plan.contrast < 0) continue;
      colour(row(y), early, late);
      sum += sum_of_luma(row(y));
    }
    if (plan.contrast >= 0) late->flat = float(int(sum / double(a.height * a.width) + 0.5));
    plan.radius ? blurred(late, end) : plain(late, end);
  }

  void plain(const Step* begin, const Step* end) {
    for (int64_t y = 0; y < a.height; ++y) {
      colour(row(y), begin, end);
      finish(a, row(y), plan.solarize, place.wide, (index * a.height + y) * a.width);
    }
  }

  void blurred(const Step* begin, const Step* end) {
    const int64_t R = plan.radius, H = a.height, line = C * size.padded;
    const float* near[2 * RADIUS + 1];
    const auto line_of = [&](int64_t y) { return place.lines + y % (2 * R + 1) * line; };
    for (int64_t y = 0; y < H + R; ++y) {
      if (y < H) {
        colour(row(y), begin, end);
        blur_along(plan, row(y), a.width, place.wide, line_of(y));
      }
      const int64_t ready = y - R;
      if (ready < 0) continue;
      for (int64_t j = -R; j <= R; ++j) near[RADIUS + j] = line_of(std::clamp(ready + j, int64_t(0), H - 1));
      convolve(plan, line, near + RADIUS, place.out);
      const Planes<C, float> out = {place.out, size.padded};
      finish(a, out, plan.solarize, place.wide, (index * H + ready) * a.width);
    }
  }
};

template <int C>
void augment(const Augment& a) {
  float sigma = 0;
  for (int64_t b = 0; b < a.count; ++b) sigma = std::max(sigma, a.params[b * COLUMNS + SIGMA]);
  const Sizes size(a, int(std::ceil(3 * double(std::min(sigma, SIGMA_MAX)))));
  const Buffer memory(size.total() * (a.threads > 1 ? a.threads : 1));
  parallel(a.threads, a.count, [&](int64_t index, int thread) {
    char* at = memory.get() + thread * size.total();
    float* wide = reinterpret_cast<float*>(at);
    const Place place = {reinterpret_cast<uint8_t*>(wide + size.wide + size.lines + size.out), wide,
                         wide + size.wide, wide + size.wide + size.lines};
    Plan plan(a.params + index * COLUMNS, C);
    Crop<C>{a, size, place, plan, index}.run();
    stream_fence();
  });
}

}  // namespace

void MOKD_JOIN(augment_, MOKD_LEVEL)(const Augment& a) { a.channels == 1 ? augment<1>(a) : augment<3>(a); }

}  // namespace mokd::cpu

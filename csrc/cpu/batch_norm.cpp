// Batch norm by a batch's own statistics, with what a ResNet does next in the same pass
//
//     y = max(0, w (x - mean) / std + b + added)      dz = dy where y > 0
//     dx = (w / std) (dz - mean dz - (x - mean) / std^2 mean(dz (x - mean)))
//
// x [rows, channels]. Forward reads x twice (statistics, result), backward what it needs twice (two sums,
// dx). The ReLU's mask is made again from x, or, where something was added, from y, which the next layer
// keeps anyway; the masked gradient is then what was added's, and is read in the second pass.
//
// Rows are joined to lines whose width is a multiple of a register pair: there is no rest of a row. Lines
// are cut into pieces of a fixed size, whose sums are joined in order: bits do not depend on the threads.
#include "batch_norm.h"

#include <cmath>
#include <type_traits>

#include "vector.h"
#include "work.h"

namespace mokd::cpu {
namespace {

constexpr int L = LANES<float>;
constexpr int64_t UNIT = 32;        // numbers: lines are a multiple of it, at every level
// Lines at a time: of wide ones fewer, for those lie far apart and share few sets of L1.
constexpr int64_t NARROW = 512, MANY = 16, FEW = 4;  // bytes, lines, lines
constexpr int64_t FEWEST = 64;      // lines of a piece: its sums are to be much less than they
constexpr int64_t PIECES = 128;     // at most, in the direction of lines
constexpr int64_t COLUMNS = 512;    // of a piece
constexpr int64_t LARGE = 3 << 20;  // bytes of a map that does not stay in the caches (bench/layers.py)

using V = Vec<float>;
static_assert(UNIT % (2 * L) == 0, "a line is whole pairs of registers");

// Two registers of numbers from column k of a line, of bf16 those of even columns and those of odd ones
// (vector.h). What belongs to a column, `place` says where: such a pair is then two loads.
struct Pair {
  V first, second;
};

inline Pair pair(const float* x) { return {load<V>(x), load<V>(x + L)}; }
inline Pair pair(const uint16_t* x) {
  const Bits both = load<Bits>(x);
  return {reinterpret_cast<V>(both << 16), reinterpret_cast<V>(both & 0xffff0000)};
}
inline void put(float* to, Pair p) { store(to, p.first), store(to + L, p.second); }

inline int64_t place(const float*, int64_t k) { return k; }
inline int64_t place(const uint16_t*, int64_t k) {
  return k / (2 * L) * (2 * L) + k % 2 * L + k % (2 * L) / 2;
}

// Of the next group: its lines are too many streams for the processor's own prefetching.
template <typename T>
inline void fetch(const T* next) {
  __builtin_prefetch(next);
  if (2 * L * sizeof(T) > 64) __builtin_prefetch(next + 64 / sizeof(T));
}

// Of a result. Where it is large it goes around the caches (AROUND): most of it would have left them before it
// is read, and what is written whole, in lines of the cache, need not be fetched. `send_back`: of numbers that
// came from a T.
template <bool AROUND>
inline void send(float* to, Pair p, int64_t ahead) {
  if constexpr (AROUND)
    stream_vector(to, p.first), stream_vector(to + L, p.second);
  else
    put(to, p), fetch(to + ahead);
}
template <bool AROUND>
inline void send(uint16_t* to, Bits both, int64_t ahead) {
  if constexpr (AROUND)
    stream_vector(reinterpret_cast<float*>(to), reinterpret_cast<V>(both));
  else
    store(to, both), fetch(to + ahead);
}
template <bool AROUND>
inline void send(uint16_t* to, Pair p, int64_t ahead) {
  send<AROUND>(to, PairedBf16::join(p.first, p.second), ahead);
}
template <bool AROUND>
inline void send_back(float* to, Pair p, int64_t ahead) {
  send<AROUND>(to, p, ahead);
}
template <bool AROUND>
inline void send_back(uint16_t* to, Pair p, int64_t ahead) {
  send<AROUND>(to, reinterpret_cast<Bits>(p.first) >> 16 | reinterpret_cast<Bits>(p.second), ahead);
}

inline float number(float x) { return x; }
inline float number(uint16_t x) { return widen(x, BF16); }
inline void set(float* to, float x) { *to = x; }
inline void set(uint16_t* to, float x) { *to = narrow_bf16(x); }

int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }

// How [rows, channels] is cut.
struct Cut {
  int64_t joined, width, lines;  // rows of a line, its numbers, and how many there are
  int64_t rest;                  // the first row that is in no line
  int64_t height, pieces, columns;
  int64_t ahead;  // lines at a time, and to what is fetched
  bool around;    // whether maps are written around the caches

  explicit Cut(const BatchNorm& c) {
    joined = UNIT / gcd(c.channels, UNIT);
    width = joined * c.channels, lines = c.rows / joined, rest = lines * joined;
    ahead = width * item_size(c.type) <= NARROW ? MANY : FEW;
    // A cache line that is written in two halves takes room in the processor meanwhile: of few lines only.
    const bool whole = WIDTH * (ahead == FEW ? 2 : 1) >= 64;
    around = whole && c.rows * c.channels * item_size(c.type) >= LARGE;
    height = (lines + PIECES - 1) / PIECES;
    height = ((height < FEWEST ? FEWEST : height) + MANY - 1) / MANY * MANY;
    pieces = (lines + height - 1) / height, columns = (width + COLUMNS - 1) / COLUMNS;
  }
};

struct Piece {
  int64_t index, line, lines, column, columns;
};

template <typename Work>
void each_piece(const BatchNorm& c, const Cut& cut, const Work& work) {
  parallel(c.threads, cut.pieces * cut.columns, [&](int64_t item, int) {
    const int64_t index = item / cut.columns, line = index * cut.height, column = item % cut.columns * COLUMNS;
    const int64_t lines = cut.lines - line < cut.height ? cut.lines - line : cut.height;
    const int64_t columns = cut.width - column < COLUMNS ? cut.width - column : COLUMNS;
    work(Piece{index, line, lines, column, columns});
    stream_fence();
  });
}

// work(line of the piece, how many, column) for groups of lines and pairs of registers; how many is known
// to the compiler for all groups but the last.
template <int64_t GROUP, typename Work>
void groups(const Piece& piece, const Work& work) {
  int64_t line = 0;
  for (; line + GROUP <= piece.lines; line += GROUP)
    for (int64_t k = 0; k < piece.columns; k += 2 * L)
      work(line, std::integral_constant<int64_t, GROUP>(), piece.column + k);
  if (line < piece.lines)
    for (int64_t k = 0; k < piece.columns; k += 2 * L) work(line, piece.lines - line, piece.column + k);
}

template <typename Work>
void each_group(const Cut& cut, const Piece& piece, const Work& work) {
  cut.ahead == MANY ? groups<MANY>(piece, work) : groups<FEW>(piece, work);
}

// Numbers of the channels, in fp64 or of a line in fp32: `rows` arrays.
template <typename A>
struct Table {
  Table(int64_t rows, int64_t width) : width(width), memory(rows * width * int64_t(sizeof(A))) {}
  A* operator[](int64_t row) const { return reinterpret_cast<A*>(memory.get()) + row * width; }
  int64_t width;
  Buffer memory;
};

// value(channel) at every place of a line that is the channel's.
template <typename T, typename F>
void spread(const Cut& cut, int64_t channels, float* to, const F& value) {
  for (int64_t ch = 0; ch < channels; ++ch) {
    const float v = value(ch);
    for (int64_t k = ch; k < cut.width; k += channels) to[place(static_cast<const T*>(nullptr), k)] = v;
  }
}

// Mean and squared deviations from it, joined exactly (Chan, Golub, LeVeque 1979).
struct Moments {
  double count, mean, squares;
  void join(double n, double other, double other_squares) {
    if (n == 0) return;
    const double apart = other - mean, total = count + n;
    mean += apart * (n / total), squares += other_squares + apart * apart * (count * n / total);
    count = total;
  }
};

// Of a piece's columns: groups are taken twice, for their mean and the deviations from that.
template <typename T>
void moments(const T* x, const Cut& cut, const Piece& piece, float* mean, float* squares) {
  x += piece.line * cut.width;
  each_group(cut, piece, [&](int64_t line, auto count, int64_t k) {
    const int64_t n = count;
    const T* at = x + line * cut.width + k;
    Pair sum = {}, square = {};
    for (int64_t i = 0; i < n; ++i) {
      const Pair v = pair(at + i * cut.width);
      fetch(at + (i + cut.ahead) * cut.width);
      sum.first += v.first, sum.second += v.second;
    }
    const float inverse = 1.0f / float(n);
    sum.first *= inverse, sum.second *= inverse;
    for (int64_t i = 0; i < n; ++i) {
      Pair v = pair(at + i * cut.width);
      v.first -= sum.first, v.second -= sum.second;
      square.first += v.first * v.first, square.second += v.second * v.second;
    }
    if (line) {
      const float share = float(n) / float(line + n), carried = share * float(line);
      const Pair old = pair(mean + k), before = pair(squares + k);
      const V a = sum.first - old.first, b = sum.second - old.second;
      sum = {old.first + a * share, old.second + b * share};
      square.first += before.first + a * a * carried, square.second += before.second + b * b * carried;
    }
    put(mean + k, sum), put(squares + k, square);
  });
}

template <typename T>
void statistics(const BatchNorm& c, const Cut& cut, double eps) {
  const T* x = static_cast<const T*>(c.x);
  const Table<float> parts(2 * cut.pieces, cut.width);
  each_piece(c, cut, [&](const Piece& piece) {
    moments(x, cut, piece, parts[2 * piece.index], parts[2 * piece.index + 1]);
  });
  const Table<double> whole(2, cut.width);
  double *mean = whole[0], *squares = whole[1], done = 0;
  for (int64_t k = 0; k < cut.width; ++k) mean[k] = squares[k] = 0;
  for (int64_t p = 0; p < cut.pieces; ++p) {
    const float *m = parts[2 * p], *s = parts[2 * p + 1];
    const double n = double(cut.lines - p * cut.height < cut.height ? cut.lines - p * cut.height : cut.height);
    const double share = n / (done + n), carried = done * share;
    for (int64_t k = 0; k < cut.width; ++k) {
      const double apart = double(m[k]) - mean[k];
      mean[k] += apart * share, squares[k] += double(s[k]) + apart * apart * carried;
    }
    done += n;
  }
  const Table<double> of_channel(2, c.channels);
  for (int64_t ch = 0; ch < c.channels; ++ch) {
    Moments all = {done, mean[place(x, ch)], squares[place(x, ch)]};
    for (int64_t k = ch + c.channels; k < cut.width; k += c.channels)
      all.join(done, mean[place(x, k)], squares[place(x, k)]);
    for (int64_t r = cut.rest; r < c.rows; ++r) all.join(1, number(x[r * c.channels + ch]), 0);
    of_channel[0][ch] = all.mean, of_channel[1][ch] = all.squares;
  }
  const double n = double(c.rows), *centre = of_channel[0], *deviations = of_channel[1];
  float *means = c.stats, *inverse = means + c.channels, *variance = inverse + c.channels;
  for (int64_t ch = 0; ch < c.channels; ++ch) {
    means[ch] = float(centre[ch]);
    inverse[ch] = float(1 / std::sqrt(deviations[ch] / n + eps));
    variance[ch] = float(deviations[ch] / (n - 1));
  }
}

// What the formulas need of each channel, at the places of a line.
template <typename T>
struct Line {
  Line(const BatchNorm& c, const Cut& cut) : table(3, cut.width) {
    spread<T>(cut, c.channels, table[0], [&](int64_t ch) { return c.stats[ch]; });
    spread<T>(cut, c.channels, table[1], [&](int64_t ch) { return c.stats[c.channels + ch] * c.weight[ch]; });
    spread<T>(cut, c.channels, table[2], [&](int64_t ch) { return c.bias[ch]; });
  }
  Table<float> table;
};

inline V affine(V x, V mean, V scale, V bias) { return (x - mean) * scale + bias; }
inline float affine(float x, float mean, float scale, float bias) { return (x - mean) * scale + bias; }

template <typename T, bool AROUND, bool ADD, bool RELU>
void normalise(const BatchNorm& c, const Cut& cut, const T* added, T* y) {
  const T* x = static_cast<const T*>(c.x);
  const Line<T> of(c, cut);
  each_piece(c, cut, [&](const Piece& piece) {
    each_group(cut, piece, [&](int64_t line, auto count, int64_t k) {
      const Pair mean = pair(of.table[0] + k), scale = pair(of.table[1] + k), bias = pair(of.table[2] + k);
      const int64_t n = count, at = (piece.line + line) * cut.width + k;
      for (int64_t i = 0; i < n; ++i) {
        const Pair v = pair(x + at + i * cut.width);
        fetch(x + at + (i + cut.ahead) * cut.width);
        Pair to = {affine(v.first, mean.first, scale.first, bias.first),
                   affine(v.second, mean.second, scale.second, bias.second)};
        if (ADD) {
          const Pair more = pair(added + at + i * cut.width);
          fetch(added + at + (i + cut.ahead) * cut.width);
          to.first += more.first, to.second += more.second;
        }
        if (RELU) to = {at_least(0, to.first), at_least(0, to.second)};
        send<AROUND>(y + at + i * cut.width, to, cut.ahead * cut.width);
      }
    });
  });
  for (int64_t i = cut.rest * c.channels; i < c.rows * c.channels; ++i) {
    const int64_t ch = i % c.channels;
    float v = affine(number(x[i]), c.stats[ch], c.stats[c.channels + ch] * c.weight[ch], c.bias[ch]);
    if (ADD) v += number(added[i]);
    set(y + i, RELU && v <= 0 ? 0 : v);
  }
}

template <typename T, bool AROUND>
void forward(const BatchNorm& c, const Cut& cut, double eps, const void* added, void* y) {
  statistics<T>(c, cut, eps);
  const T* more = static_cast<const T*>(added);
  T* to = static_cast<T*>(y);
  if (more)
    c.relu ? normalise<T, AROUND, true, true>(c, cut, more, to) : normalise<T, AROUND, true, false>(c, cut, more, to);
  else
    c.relu ? normalise<T, AROUND, false, true>(c, cut, more, to) : normalise<T, AROUND, false, false>(c, cut, more, to);
}

// Where a gradient's mask comes from.
enum Mask { NONE, FROM_X, FROM_Y };

inline V masked(V grad, V y) { return y <= 0.0f ? V{} : grad; }  // NaN lets through, as PyTorch's
inline float masked(float grad, float y) { return y <= 0 ? 0 : grad; }

// sums [2, width]: of dz, and of dz (x - mean).
template <typename T, bool AROUND, Mask MASK>
void sums(const BatchNorm& c, const Cut& cut, const BatchNormBackward& b, const Line<T>& of, double* total[2]) {
  const T *x = static_cast<const T*>(c.x), *grad = static_cast<const T*>(b.grad);
  const T* y = static_cast<const T*>(b.y);
  T* out = static_cast<T*>(b.masked);
  const Table<float> parts(2 * cut.pieces, cut.width);
  each_piece(c, cut, [&](const Piece& piece) {
    float *plain = parts[2 * piece.index], *along = parts[2 * piece.index + 1];
    each_group(cut, piece, [&](int64_t line, auto count, int64_t k) {
      const Pair mean = pair(of.table[0] + k), scale = pair(of.table[1] + k), bias = pair(of.table[2] + k);
      const int64_t n = count, from = (piece.line + line) * cut.width + k;
      Pair sum = {}, dot = {};
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = from + i * cut.width;
        const Pair v = pair(x + at);
        Pair dz = pair(grad + at);
        fetch(x + at + cut.ahead * cut.width), fetch(grad + at + cut.ahead * cut.width);
        if (MASK == FROM_X)
          dz = {masked(dz.first, affine(v.first, mean.first, scale.first, bias.first)),
                masked(dz.second, affine(v.second, mean.second, scale.second, bias.second))};
        if (MASK == FROM_Y) {
          const Pair result = pair(y + at);
          fetch(y + at + cut.ahead * cut.width);
          dz = {masked(dz.first, result.first), masked(dz.second, result.second)};
          send_back<AROUND>(out + at, dz, cut.ahead * cut.width);
        }
        sum.first += dz.first, sum.second += dz.second;
        dot.first += dz.first * (v.first - mean.first), dot.second += dz.second * (v.second - mean.second);
      }
      if (line) {
        const Pair before = pair(plain + k), dots = pair(along + k);
        sum.first += before.first, sum.second += before.second;
        dot.first += dots.first, dot.second += dots.second;
      }
      put(plain + k, sum), put(along + k, dot);
    });
  });
  const Table<double> whole(2, cut.width);
  for (int row = 0; row < 2; ++row) {
    double* line = whole[row];
    for (int64_t k = 0; k < cut.width; ++k) line[k] = 0;
    for (int64_t p = 0; p < cut.pieces; ++p)
      for (int64_t k = 0; k < cut.width; ++k) line[k] += double(parts[2 * p + row][k]);
    for (int64_t ch = 0; ch < c.channels; ++ch) {
      total[row][ch] = 0;
      for (int64_t k = ch; k < cut.width; k += c.channels) total[row][ch] += line[place(x, k)];
    }
  }
  for (int64_t i = cut.rest * c.channels; i < c.rows * c.channels; ++i) {
    const int64_t ch = i % c.channels;
    const float v = number(x[i]), scale = c.stats[c.channels + ch] * c.weight[ch];
    float dz = number(grad[i]);
    if (MASK == FROM_X) dz = masked(dz, affine(v, c.stats[ch], scale, c.bias[ch]));
    if (MASK == FROM_Y) dz = masked(dz, number(y[i])), set(out + i, dz);
    total[0][ch] += dz, total[1][ch] += double(dz) * (double(v) - double(c.stats[ch]));
  }
}

// dx, where dz is `grad` itself or masked from x. mean_dz, mean_dot: of a channel, of a line's places.
template <typename T, bool AROUND, Mask MASK>
void gradient(const BatchNorm& c, const Cut& cut, const T* grad, const Line<T>& of, const Table<float>& means,
              const float* mean_dz, const float* mean_dot, T* dx) {
  const T* x = static_cast<const T*>(c.x);
  each_piece(c, cut, [&](const Piece& piece) {
    each_group(cut, piece, [&](int64_t line, auto count, int64_t k) {
      const Pair mean = pair(of.table[0] + k), scale = pair(of.table[1] + k), bias = pair(of.table[2] + k);
      const Pair plain = pair(means[0] + k), along = pair(means[1] + k);
      const int64_t n = count, from = (piece.line + line) * cut.width + k;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = from + i * cut.width;
        const Pair v = pair(x + at);
        Pair dz = pair(grad + at);
        fetch(x + at + cut.ahead * cut.width), fetch(grad + at + cut.ahead * cut.width);
        if (MASK == FROM_X)
          dz = {masked(dz.first, affine(v.first, mean.first, scale.first, bias.first)),
                masked(dz.second, affine(v.second, mean.second, scale.second, bias.second))};
        const Pair to = {(dz.first - plain.first - (v.first - mean.first) * along.first) * scale.first,
                         (dz.second - plain.second - (v.second - mean.second) * along.second) * scale.second};
        send<AROUND>(dx + at, to, cut.ahead * cut.width);
      }
    });
  });
  for (int64_t i = cut.rest * c.channels; i < c.rows * c.channels; ++i) {
    const int64_t ch = i % c.channels;
    const float v = number(x[i]), mean = c.stats[ch], scale = c.stats[c.channels + ch] * c.weight[ch];
    float dz = number(grad[i]);
    if (MASK == FROM_X) dz = masked(dz, affine(v, mean, scale, c.bias[ch]));
    set(dx + i, (dz - mean_dz[ch] - (v - mean) * mean_dot[ch]) * scale);
  }
}

template <typename T, bool AROUND>
void backward(const BatchNorm& c, const Cut& cut, const BatchNormBackward& b) {
  const Line<T> of(c, cut);
  const Table<double> totals(2, c.channels);
  double* total[2] = {totals[0], totals[1]};
  const bool from_x = c.relu && !b.y;
  if (b.y)
    sums<T, AROUND, FROM_Y>(c, cut, b, of, total);
  else
    from_x ? sums<T, AROUND, FROM_X>(c, cut, b, of, total) : sums<T, AROUND, NONE>(c, cut, b, of, total);
  const Table<float> of_channel(2, c.channels), means(2, cut.width);
  for (int64_t ch = 0; ch < c.channels; ++ch) {
    const double inverse = c.stats[c.channels + ch], n = double(c.rows);
    b.for_bias[ch] = float(total[0][ch]), b.for_weight[ch] = float(total[1][ch] * inverse);
    of_channel[0][ch] = float(total[0][ch] / n), of_channel[1][ch] = float(total[1][ch] * inverse * inverse / n);
  }
  for (int row = 0; row < 2; ++row)
    spread<T>(cut, c.channels, means[row], [&](int64_t ch) { return of_channel[row][ch]; });
  const T* dz = static_cast<const T*>(b.y ? b.masked : b.grad);
  T* dx = static_cast<T*>(b.dx);
  from_x ? gradient<T, AROUND, FROM_X>(c, cut, dz, of, means, of_channel[0], of_channel[1], dx)
         : gradient<T, AROUND, NONE>(c, cut, dz, of, means, of_channel[0], of_channel[1], dx);
}

template <typename T>
void forward_of(const BatchNorm& c, double eps, const void* added, void* y) {
  const Cut cut(c);
  cut.around ? forward<T, true>(c, cut, eps, added, y) : forward<T, false>(c, cut, eps, added, y);
}

template <typename T>
void backward_of(const BatchNorm& c, const BatchNormBackward& b) {
  const Cut cut(c);
  cut.around ? backward<T, true>(c, cut, b) : backward<T, false>(c, cut, b);
}

void run_forward(const BatchNorm& c, double eps, const void* added, void* y) {
  c.type == BF16 ? forward_of<uint16_t>(c, eps, added, y) : forward_of<float>(c, eps, added, y);
}

void run_backward(const BatchNorm& c, const BatchNormBackward& b) {
  c.type == BF16 ? backward_of<uint16_t>(c, b) : backward_of<float>(c, b);
}

}  // namespace

extern const BatchNormKernels MOKD_JOIN(batch_norm_kernels_, MOKD_LEVEL);
const BatchNormKernels MOKD_JOIN(batch_norm_kernels_, MOKD_LEVEL) = {run_forward, run_backward};

}  // namespace mokd::cpu

// The feature search: what CPU and CUDA share. Formula: mokd_fast/ops/search.py.
// Q queries, B images, H heads, N tokens, d width of a head.
#pragma once
#include "distill.h"

namespace mokd {

// A tensor of four dimensions whose last one is contiguous: strides in elements. data may be null.
struct Heads {
  const void* data;
  Type type;
  int64_t stride[3];
};

// feature_search has x, k and v, joint_attention all six.
struct Search {
  Type type;  // of what is written; the arithmetic is fp64 for F64, else fp32
  int threads;
  int64_t queries, images, heads, tokens, width;
  Heads q, k, v;    // the tokens' own, [B, H, N, d]
  Heads x, kx, vx;  // the queries', [Q, B, H, d]
};

static MOKD_HOST_DEVICE inline bool joint(const Search& s) { return s.q.data; }

// The rows that attend over the tokens: the queries, in joint_attention the tokens before them.
static MOKD_HOST_DEVICE inline int64_t own_rows(const Search& s) { return joint(s) ? s.tokens : 0; }
static MOKD_HOST_DEVICE inline int64_t rows(const Search& s) { return own_rows(s) + s.queries; }

// rows [B, M, H, d] and stats [B, M, H, 2], of the arithmetic's type, of M rows over the tokens alone: the
// mean of the values, then the largest product q k and the sum of exp((q k - largest) / sqrt d). weights
// [Q, B, H, N] of the arithmetic's type, or null. joint_attention's results, of `type`: tokens
// [Q, B, N, H, d], query [Q, B, H, d].
struct SearchForward {
  void *rows, *stats, *weights, *tokens, *query;
};

// rows of joint_attention alone. Gradients come of the rows (feature_search) or of tokens and query; written are
// q, k, v [B, N, H, d] and x, kx, vx [Q, B, H, d], of `type`.
struct SearchBackward {
  const void *rows, *stats;
  Heads grad, grad_tokens;  // strides of [Q, B, H] and of [Q, B, N], where heads are d apart
  void *q, *k, *v, *x, *kx, *vx;
};

}  // namespace mokd

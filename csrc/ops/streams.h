// Streams as autograd sees them: a list of tensors, and a byte for each stream that says which are its own.
#pragma once

#include "implementation.h"

namespace rfkernels {

constexpr size_t kMostStreams = 4;

enum : int64_t { kPacked = 1, kQueries = 2, kQWeight = 4, kKWeight = 8, kLengths = 16, kAsks = 32 };

struct Flat {
  std::vector<Tensor> tensors;
  int64_t codes = 0;                        // a byte for each stream, the first lowest
  int64_t count = 0;
};

inline Flat flatten(const std::vector<Stream>& streams) {
  Flat flat;
  flat.count = static_cast<int64_t>(streams.size());
  int64_t place = 0;
  for (const Stream& s : streams) {
    int64_t code = s.asks ? kAsks : 0;
    const auto add = [&](const Tensor& t, int64_t bit) {
      if (!t.defined()) return;
      flat.tensors.push_back(t);
      code |= bit;
    };
    add(s.packed, kPacked);
    if (!s.packed.defined()) {
      add(s.q, kQueries);
      add(s.k, 0);
      add(s.v, 0);
    }
    add(s.q_weight, kQWeight);
    add(s.k_weight, kKWeight);
    add(s.lengths, kLengths);
    flat.codes |= code << place;
    place += 8;
  }
  return flat;
}

// q, k, v of a packed stream.
inline void unpack(const Tensor& packed, Tensor& q, Tensor& k, Tensor& v) {
  const int64_t parts = packed.size(2);
  if (parts == 3) q = packed.select(2, 0);
  k = packed.select(2, parts - 2);
  v = packed.select(2, parts - 1);
}

inline std::vector<Stream> parse(at::TensorList tensors, int64_t codes, int64_t count) {
  std::vector<Stream> streams(count);
  size_t next = 0;
  for (Stream& s : streams) {
    const int64_t code = codes & 255;
    codes >>= 8;
    if (code & kPacked) {
      s.packed = tensors[next++];
      unpack(s.packed, s.q, s.k, s.v);
    } else {
      if (code & kQueries) s.q = tensors[next++];
      s.k = tensors[next++];
      s.v = tensors[next++];
    }
    if (code & kQWeight) s.q_weight = tensors[next++];
    if (code & kKWeight) s.k_weight = tensors[next++];
    if (code & kLengths) s.lengths = tensors[next++];
    s.asks = code & kAsks;
  }
  return streams;
}

// Empty gradients of a stream's activations, those of a packed one as parts of one tensor.
inline StreamGradients empty_gradients(const Stream& s) {
  StreamGradients made;
  if (s.packed.defined()) {
    made.packed = at::empty(s.packed.sizes(), s.packed.options());
    unpack(made.packed, made.q, made.k, made.v);
  } else {
    if (s.q.defined()) made.q = fresh(s.q);
    made.k = fresh(s.k);
    made.v = fresh(s.v);
  }
  if (made.q.defined() && !s.asks) made.q.zero_();
  return made;
}

// In the order of `flatten`; zeros for a weight that nothing used.
inline void append(std::vector<Tensor>& list, const Stream& s, const StreamGradients& g) {
  if (s.packed.defined()) {
    list.push_back(g.packed);
  } else {
    if (s.q.defined()) list.push_back(g.q);
    list.push_back(g.k);
    list.push_back(g.v);
  }
  if (s.q_weight.defined()) list.push_back(g.q_weight.defined() ? g.q_weight : at::zeros_like(s.q_weight));
  if (s.k_weight.defined()) list.push_back(g.k_weight.defined() ? g.k_weight : at::zeros_like(s.k_weight));
  if (s.lengths.defined()) list.emplace_back();
}

}  // namespace rfkernels

#include "attention.h"

#include <cmath>

#include "../ops/autograd.h"
#include "../ops/streams.h"
#include "launch.h"

namespace rfkernels::launch {
namespace {

constexpr const char* kForward = "rfkernels.joint_attention.kernels";
constexpr const char* kBackward = "rfkernels.joint_attention.backward_kernels";
constexpr Kernel kKeys{kForward, "key_rstd"}, kAttention{kForward, "attention_fwd"},
    kQueriesBackward{kBackward, "attention_bwd_q"}, kKeysBackward{kBackward, "attention_bwd_kv"},
    kSumRows{kBackward, "sum_rows"}, kSumHeads{kBackward, "sum_heads"};

constexpr int64_t kTokens = 128, kMostTokenStride = (int64_t{1} << 31) / 128;
constexpr int64_t kSummedRows = 1024, kSummedColumns = 8;
const double kLog2E = std::log2(2.718281828459045);

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<int64_t>;

// Of each dtype, (centre, limit) of the shift that replaces a running maximum; see launch.py.
std::pair<double, double> exponents(ScalarType type) {
  if (type == at::kBFloat16) return {64.0, 94.0};
  if (type == at::kHalf) return {15.0, 14.5};
  return {0.0, 50.0};
}

int64_t block_of(int64_t dim) {
  int64_t block = 16;
  while (block < dim) block *= 2;
  return block;
}

// What the kernels see: streams that give keys, and among them those that ask; each list in the kernels' order.
struct Core {
  Tensors qs, ks, vs, q_weights, k_weights, q_lengths, k_lengths;
  Numbers query_sizes, sizes;
  bool norm, masked = false;

  explicit Core(const std::vector<Stream>& streams) : norm(streams[0].k_weight.defined()) {
    for (const Stream& s : streams) masked |= s.lengths.defined();
    for (const Stream& s : streams) {
      const int64_t length = s.k.size(1);
      ks.push_back(s.k);
      vs.push_back(s.v);
      sizes.push_back(length);
      k_weights.push_back(s.k_weight.defined() ? s.k_weight.contiguous() : Tensor());
      Tensor lengths;
      if (masked)
        lengths = s.lengths.defined() ? s.lengths.contiguous()
                                      : at::full({s.k.size(0)}, length, s.k.options().dtype(at::kLong));
      k_lengths.push_back(lengths);
      if (!s.asks) continue;
      qs.push_back(s.q);
      query_sizes.push_back(length);
      q_weights.push_back(s.q_weight.defined() ? s.q_weight.contiguous() : Tensor());
      q_lengths.push_back(lengths);
    }
    alike(q_weights, at::kFloat);
    alike(k_weights, at::kFloat);
    alike(q_lengths, at::kLong);
    alike(k_lengths, at::kLong);
  }

  // Of one dtype: a kernel picks one of them at run time.
  static void alike(Tensors& tensors, ScalarType widest) {
    bool same = true;
    for (const Tensor& t : tensors) same &= !t.defined() || t.scalar_type() == tensors[0].scalar_type();
    if (same) return;
    for (Tensor& t : tensors) t = t.to(widest);
  }
};

int64_t sum(const Numbers& numbers) {
  int64_t total = 0;
  for (const int64_t n : numbers) total += n;
  return total;
}

int64_t tiles(const Numbers& sizes, int64_t block) {
  int64_t total = 0;
  for (const int64_t n : sizes) total += ceil_div(n, block);
  return total;
}

// (batch, token, head) strides, each a tuple over the streams.
void strides(Call& call, const Tensors& tensors) {
  const auto mark = [&](Value::Kind kind) { call.push({kind}); };
  mark(Value::kOpen);
  for (int i = 0; i < 3; ++i) {
    mark(Value::kOpen);
    for (const Tensor& t : tensors) call << t.stride(i);
    mark(Value::kClose);
  }
  mark(Value::kClose);
}

void four(Call& call, const Numbers& sizes) {
  for (size_t i = 0; i < 4; ++i) call << (i < sizes.size() ? sizes[i] : int64_t{0});
}

struct Tile {
  int64_t queries, keys;
};

Tile tile(Call& call, const char* name, const Tensor& like) {
  const auto& found = settings(name, like.size(3), like);  // queries, keys, warps, stages, registers, three products
  call.with("D", like.size(3)).with("BLOCK_M", found[0]).with("BLOCK_N", found[1]);
  call.with("BLOCK_D", block_of(like.size(3))).with("num_warps", found[2]).with("num_stages", found[3]);
  call.with("enable_fp_fusion", true);
  if (found[4]) call.with("maxnreg", found[4]);
  call.with("PRECISION", found[5] ? "tf32x3" : "ieee");
  return {found[0], found[1]};
}

// Consecutive runs of rows of partials, summed: one gradient for each weight.
Tensors sum_rows(const Tensor& partials, const Tensors& like, const Numbers& counts) {
  ScalarType type = like[0].scalar_type();
  for (const Tensor& w : like)
    if (w.scalar_type() != type) type = at::kFloat;       // the kernel picks one of them at run time
  Tensors outs;
  for (const Tensor& w : like) outs.push_back(at::empty(w.sizes(), w.options().dtype(type)));
  const int64_t dim = partials.size(1), count = static_cast<int64_t>(outs.size());
  Call call(kSumRows, partials);
  call << outs << partials;
  for (size_t i = 0; i < 8; ++i) call << (i < counts.size() ? counts[i] : int64_t{0});
  call.with("D", dim).with("N", count).with("ROWS", kSummedRows).with("COLUMNS", kSummedColumns);
  call.with("num_warps", 8).with("enable_fp_fusion", true);
  call.run({count, ceil_div(dim, kSummedColumns)});
  for (size_t i = 0; i < like.size(); ++i) outs[i] = outs[i].to(like[i].scalar_type());
  return outs;
}

}  // namespace

const char* refuses(const std::vector<Stream>& streams) {
  const Stream& first = streams[0];
  const bool norm = first.k_weight.defined();
  const int64_t batch = first.k.size(0), heads = first.k.size(2), dim = first.k.size(3);
  if (dim > 128 || dim % 8 || batch > kMostGrid || heads > kMostGrid) return "these sizes are not for the kernels";
  int64_t tokens = 0;
  bool graph = false;
  for (const Stream& s : streams) {
    tokens += s.k.size(1);
    graph = graph || wants_gradient({&s.packed, &s.q, &s.k, &s.v, &s.q_weight, &s.k_weight});
    if (s.k.scalar_type() != first.k.scalar_type() || s.k.device() != first.k.device() || s.k.size(0) != batch ||
        s.k.size(2) != heads || s.k.size(3) != dim)
      return "streams differ";
    if (s.k_weight.defined() != norm || (s.asks && s.q_weight.defined() != norm)) return "some streams have no norm";
    for (const Tensor* t : {&s.q, &s.k, &s.v})
      if (t->defined() && t->stride(1) >= kMostTokenStride) return "tokens lie too far apart";
  }
  if (tokens >= settings("library_from", dim, first.k)[graph ? 0 : 1]) return "by the launch table a library is faster";
  return nullptr;
}

Attention attention(const std::vector<Stream>& streams, double scale, double eps) {
  const Core core(streams);
  const Tensor& like = core.ks[0];
  const int64_t batch = like.size(0), heads = like.size(2), dim = like.size(3);
  const int64_t keys = sum(core.sizes), queries = sum(core.query_sizes);
  Attention made;
  for (const Tensor& q : core.qs) made.outs.push_back(fresh(q));
  const auto wide = like.options().dtype(at::kFloat);
  made.lse = at::empty({batch, heads, queries}, wide);
  made.rstd = core.norm ? at::empty({batch, heads, keys}, wide) : at::empty({0}, wide);
  if (!made.lse.numel()) {
    made.rstd.zero_();
    return made;
  }
  const int64_t count = static_cast<int64_t>(core.ks.size());
  if (core.norm) {
    Call call(kKeys, like);
    call << core.ks;
    strides(call, core.ks);
    call << core.k_lengths << made.rstd << eps << keys;
    four(call, core.sizes);
    call.with("LENGTHS", core.masked).with("D", dim).with("N", count).with("BLOCK", kTokens);
    call.with("BLOCK_D", block_of(dim)).with("num_warps", 4).with("enable_fp_fusion", true);
    call.run({tiles(core.sizes, kTokens), heads, batch});
  }
  Call call(kAttention, like);
  call << core.qs << core.ks << core.vs << made.outs << core.q_weights << core.k_weights << core.q_lengths
       << core.k_lengths;
  strides(call, core.qs);
  strides(call, core.ks);
  strides(call, core.vs);
  call << made.rstd << made.lse << scale * kLog2E << eps << queries << keys;
  four(call, core.query_sizes);
  four(call, core.sizes);
  const auto [centre, limit] = exponents(like.scalar_type());
  call.with("NORM", core.norm).with("BOUNDED", core.norm).with("LENGTHS", core.masked).with("CENTRE", centre);
  call.with("LIMIT", limit).with("NQ", static_cast<int64_t>(core.qs.size())).with("N", count);
  const Tile of = tile(call, "attention_fwd", like);
  call.run({tiles(core.query_sizes, of.queries), heads, batch});
  return made;
}

std::vector<StreamGradients> attention_backward(const std::vector<Tensor>& grads, const Attention& made,
                                                const std::vector<Stream>& streams, double scale, double eps,
                                                bool bias) {
  const Core core(streams);
  const Tensor& like = core.ks[0];
  const int64_t batch = like.size(0), heads = like.size(2), dim = like.size(3), queries = made.lse.size(2);
  const auto wide = like.options().dtype(at::kFloat);
  std::vector<StreamGradients> found;
  Tensors dqs, dks, dvs, douts, folds, first_folds;
  for (const Stream& s : streams) {
    found.push_back(empty_gradients(s));
    if (s.asks) dqs.push_back(found.back().q);
    dks.push_back(found.back().k);
    dvs.push_back(found.back().v);
  }
  const size_t count = core.ks.size();
  if (!made.lse.numel()) {
    for (StreamGradients& g : found) {
      for (Tensor* t : {&g.packed, &g.q, &g.k, &g.v})
        if (t->defined()) t->zero_();
      if (bias) g.bias = at::zeros({3, heads, dim}, like.options());
    }
    return found;
  }
  for (const Tensor& g : grads)
    douts.push_back(g.stride(3) == 1 && g.stride(1) < kMostTokenStride ? g : g.contiguous());
  const Tensor delta = at::empty(made.lse.sizes(), wide);
  if (core.norm)
    for (const Tensor& q : core.qs) {
      folds.push_back(at::empty({static_cast<int64_t>(count), q.size(0), q.size(1), heads, dim}, q.options()));
      first_folds.push_back(folds.back().select(0, 0));
    }
  const Tensors& seen = core.norm ? folds : core.qs;                   // queries as the second kernel reads them
  Call of_queries(kQueriesBackward, like);
  const int64_t block = settings("attention_bwd_q", dim, like)[0];
  Numbers rows;
  for (const int64_t n : core.query_sizes) rows.push_back(ceil_div(n, block) * heads * batch);
  const int64_t all_rows = sum(rows), sections = core.norm ? 1 + static_cast<int64_t>(count) : 0;
  const Tensor partials = at::empty({(sections + bias) * all_rows, dim}, wide);
  of_queries << core.qs << core.ks << core.vs << made.outs << douts << dqs << seen << core.q_weights << core.k_weights
             << core.q_lengths << core.k_lengths;
  strides(of_queries, core.qs);
  strides(of_queries, core.ks);
  strides(of_queries, core.vs);
  strides(of_queries, douts);
  strides(of_queries, dqs);
  of_queries << made.rstd << made.lse << delta << partials << scale * kLog2E << eps << queries << sum(core.sizes);
  const auto finish = [&](Call& call) {
    four(call, core.query_sizes);
    four(call, core.sizes);
    call.with("NORM", core.norm).with("LENGTHS", core.masked).with("NQ", static_cast<int64_t>(core.qs.size()));
    call.with("N", static_cast<int64_t>(count)).with("BIAS", bias);
  };
  finish(of_queries);
  tile(of_queries, "attention_bwd_q", like);
  of_queries.run({tiles(core.query_sizes, block), heads, batch});

  const int64_t keys_block = settings("attention_bwd_kv", dim, like)[1], key_tiles = tiles(core.sizes, keys_block);
  const Tensor sums = at::empty({2 * key_tiles * batch * heads * bias, dim}, wide);
  Call of_keys(kKeysBackward, like);
  of_keys << seen << core.ks << core.vs << douts << dks << dvs << core.q_lengths << core.k_lengths;
  strides(of_keys, core.norm ? first_folds : core.qs);
  strides(of_keys, core.ks);
  strides(of_keys, core.vs);
  strides(of_keys, douts);
  strides(of_keys, dks);
  strides(of_keys, dvs);
  of_keys << made.lse << delta << sums << scale * kLog2E << eps << queries;
  finish(of_keys);
  tile(of_keys, "attention_bwd_kv", like);
  of_keys.run({key_tiles, heads, batch});

  if (bias) {
    Tensors outs;
    for (StreamGradients& g : found) outs.push_back(g.bias = at::empty({3, heads, dim}, like.options()));
    const Tensor q_sums = partials.narrow(0, sections * all_rows, all_rows);
    Call call(kSumHeads, like);
    call << outs << q_sums << sums << batch;
    four(call, core.sizes);
    call.with("D", dim).with("N", static_cast<int64_t>(count)).with("BLOCK_M", block).with("BLOCK_N", keys_block);
    call.with("ROWS", 64).with("BLOCK_D", block_of(dim)).with("num_warps", 4).with("enable_fp_fusion", true);
    call.run({heads, 3 * static_cast<int64_t>(count)});
  }
  if (!core.norm) return found;
  Tensors weights;
  for (const Stream& s : streams)
    if (s.asks) weights.push_back(s.q_weight);
  for (const Stream& s : streams) weights.push_back(s.k_weight);
  Numbers counts = rows;
  for (size_t i = 0; i < count; ++i) counts.push_back(all_rows);
  const Tensors summed = sum_rows(partials, weights, counts);
  size_t next = 0;
  for (size_t i = 0; i < count; ++i)
    if (streams[i].asks) found[i].q_weight = summed[next++];
  for (size_t i = 0; i < count; ++i) found[i].k_weight = summed[next++];
  return found;
}

}  // namespace rfkernels::launch

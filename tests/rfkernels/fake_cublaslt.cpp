// cuBLASLt as its documentation has it, on a CPU, for what csrc/lt asks: column-major products with the epilogues
// GELU_AUX_BIAS, DGELU_BGRAD and BGRADB, in fp64, rounded once. Refuses what the documentation forbids.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int kInvalid = 7, kNotSupported = 15;
long calls = 0, heuristics = 0;
bool refuses = false, fails = false;

struct Operation {
  int32_t compute = 0, trans_a = 0, trans_b = 0;
  uint32_t epilogue = 1;
  void *bias = nullptr, *aux = nullptr;
  int64_t aux_leading = 0;
};
struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t leading;
};
struct Preference {
  uint64_t workspace = 0;
  uint32_t reductions = 7, aligned[4] = {256, 256, 256, 256};
};

double read(int type, const void* from, int64_t i) {
  if (type == 0) return static_cast<const float*>(from)[i];
  const uint16_t bits = static_cast<const uint16_t*>(from)[i];
  if (type == 2) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<double>(half);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

void write(int type, void* to, int64_t i, double value) {
  const float narrow = static_cast<float>(value);
  if (type == 0) {
    static_cast<float*>(to)[i] = narrow;
    return;
  }
  uint16_t bits;
  if (type == 2) {
    const _Float16 half = static_cast<_Float16>(narrow);
    std::memcpy(&bits, &half, 2);
  } else {
    uint32_t wide;
    std::memcpy(&wide, &narrow, 4);
    bits = static_cast<uint16_t>((wide + 0x7fffu + (wide >> 16 & 1u)) >> 16);
  }
  static_cast<uint16_t*>(to)[i] = bits;
}

double slope(double h, double* value) {
  const double u = std::sqrt(2 / M_PI) * (h + 0.044715 * h * h * h), t = std::tanh(u);
  *value = 0.5 * h * (1 + t);
  return 0.5 * (1 + t) + 0.5 * h * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * h * h);
}

// What the documentation says of an operation on these matrices; 0: it can be done.
int judged(const Operation& o, const Layout& a, const Layout& b, const Layout& d) {
  const uint64_t m = o.trans_a ? a.columns : a.rows, k = o.trans_a ? a.rows : a.columns;
  const uint64_t n = o.trans_b ? b.rows : b.columns, other = o.trans_b ? b.columns : b.rows;
  if (m != d.rows || n != d.columns || k != other) return kInvalid;
  for (const Layout* l : {&a, &b, &d})
    if (l->leading < static_cast<int64_t>(l->rows)) return kInvalid;
  if (o.compute != 68 && !(o.compute == 77 && d.type == 0)) return kNotSupported;
  if (o.epilogue != 1 && !o.bias) return kInvalid;
  if (o.epilogue & 128 && (!o.aux || o.aux_leading % 8 || o.aux_leading < static_cast<int64_t>(d.rows))) return kInvalid;
  return 0;
}

bool aligned(const void* address, uint32_t to) { return reinterpret_cast<uintptr_t>(address) % to == 0; }

}  // namespace

extern "C" {

long fake_calls() { return calls; }
long fake_heuristics() { return heuristics; }
void fake_refuse(int on) { refuses = on; }         // heuristics find nothing
void fake_fail(int on) { fails = on; }             // a product that was found does not start

int cublasLtCreate(void** made) {
  *made = new int(0);
  return 0;
}
int cublasLtMatmulDescCreate(void** made, int compute, int) {
  auto* o = new Operation;
  o->compute = compute;
  *made = o;
  return 0;
}
int cublasLtMatmulDescDestroy(void* o) {
  delete static_cast<Operation*>(o);
  return 0;
}
int cublasLtMatmulDescSetAttribute(void* to, int attribute, const void* value, size_t size) {
  auto& o = *static_cast<Operation*>(to);
  const auto put = [&](auto& field) {
    if (size != sizeof field) return kInvalid;
    std::memcpy(&field, value, size);
    return 0;
  };
  switch (attribute) {
    case 3: return put(o.trans_a);
    case 4: return put(o.trans_b);
    case 7: return put(o.epilogue);
    case 8: return put(o.bias);
    case 11: return put(o.aux);
    case 12: return put(o.aux_leading);
    default: return kInvalid;
  }
}
int cublasLtMatrixLayoutCreate(void** made, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  *made = new Layout{type, rows, columns, leading};
  return 0;
}
int cublasLtMatrixLayoutDestroy(void* layout) {
  delete static_cast<Layout*>(layout);
  return 0;
}
int cublasLtMatmulPreferenceCreate(void** made) {
  *made = new Preference;
  return 0;
}
int cublasLtMatmulPreferenceDestroy(void* preference) {
  delete static_cast<Preference*>(preference);
  return 0;
}
int cublasLtMatmulPreferenceSetAttribute(void* to, int attribute, const void* value, size_t size) {
  auto& p = *static_cast<Preference*>(to);
  if (attribute == 1 && size == 8) std::memcpy(&p.workspace, value, 8);
  else if (attribute == 3 && size == 4) std::memcpy(&p.reductions, value, 4);
  else if (attribute >= 5 && attribute < 9 && size == 4) std::memcpy(&p.aligned[attribute - 5], value, 4);
  else return kInvalid;
  return 0;
}

struct Found {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

// The algorithm remembers which alignment it was chosen for.
int cublasLtMatmulAlgoGetHeuristic(void*, void* operation, void* a, void* b, void*, void* d, void* preference, int wanted,
                                   void* results, int* count) {
  ++heuristics;
  *count = 0;
  const auto& p = *static_cast<Preference*>(preference);
  if (const int status = judged(*static_cast<Operation*>(operation), *static_cast<Layout*>(a), *static_cast<Layout*>(b),
                                *static_cast<Layout*>(d)))
    return status;
  if (refuses || wanted < 1 || p.reductions != 2) return kNotSupported;
  Found made{};
  for (int i = 0; i < 4; ++i) made.algorithm[i] = p.aligned[i];
  made.workspace = 1024;
  std::memcpy(results, &made, sizeof made);
  *count = 1;
  return 0;
}

int cublasLtMatmul(void*, void* operation, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                   const void* beta, const void*, void*, void* d, void* d_layout, const void* algorithm, void* workspace,
                   size_t bytes, void*) {
  const auto& o = *static_cast<Operation*>(operation);
  const auto &la = *static_cast<Layout*>(a_layout), &lb = *static_cast<Layout*>(b_layout), &ld = *static_cast<Layout*>(d_layout);
  if (const int status = judged(o, la, lb, ld)) return status;
  const auto* for_aligned = static_cast<const uint64_t*>(algorithm);
  if (fails || !workspace || bytes < 1024 || *static_cast<const float*>(alpha) != 1 || *static_cast<const float*>(beta) != 0)
    return 13;
  if (!aligned(a, static_cast<uint32_t>(for_aligned[0])) || !aligned(b, static_cast<uint32_t>(for_aligned[1])) ||
      !aligned(d, static_cast<uint32_t>(for_aligned[3])))
    return kNotSupported;
  ++calls;
  const auto at_a = [&](int64_t i, int64_t j) { return read(la.type, a, o.trans_a ? j + i * la.leading : i + j * la.leading); };
  const auto at_b = [&](int64_t i, int64_t j) { return read(lb.type, b, o.trans_b ? j + i * lb.leading : i + j * lb.leading); };
  const auto rows = static_cast<int64_t>(ld.rows), columns = static_cast<int64_t>(ld.columns);
  const auto depth = static_cast<int64_t>(o.trans_a ? la.rows : la.columns);
  for (int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < columns; ++j) {
      double value = 0, activated;
      for (int64_t k = 0; k < depth; ++k) value += at_a(i, k) * at_b(k, j);
      const int64_t aux = i + j * o.aux_leading;
      if (o.epilogue == (32 | 128 | 4)) {
        value += read(ld.type, o.bias, i);
        write(ld.type, o.aux, aux, value);
        slope(value, &activated);
        value = activated;
      } else if (o.epilogue == (64 | 128 | 16)) {
        value *= slope(read(ld.type, o.aux, aux), &activated);
        sum += value;
      }
      write(ld.type, d, i + j * ld.leading, value);
    }
    if (o.epilogue == (64 | 128 | 16)) write(ld.type, o.bias, i, sum);
  }
  if (o.epilogue == 512)
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += at_b(k, j);
      write(ld.type, o.bias, j, sum);
    }
  return 0;
}
}

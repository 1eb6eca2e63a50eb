#include "lt.h"

#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <vector>

#include "../launch/launch.h"

namespace rfkernels::lt {
namespace {

using at::Tensor;

// cuBLASLt's own types and numbers, as far as they are needed: its header is no part of PyTorch.
using Status = int;
using Handle = void*;
using Descriptor = void*;
struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};
constexpr int kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8, kAuxPointer = 11, kAuxLeading = 12;
constexpr int kMostWorkspace = 1, kReductions = 3, kAlignmentA = 5;          // of B, C and D: the next ones
constexpr uint32_t kGeluAuxBias = 32 | 128 | 4, kGeluBackwardBias = 64 | 128 | 16, kBiasGradientB = 512;
constexpr uint32_t kReduceInFp32 = 2;
constexpr int kCompute32 = 68, kComputeTf32 = 77, kReal32 = 0;
constexpr size_t kWorkspace = size_t{32} << 20;

struct Library {
  Status (*create)(Handle*);
  Status (*matmul_create)(Descriptor*, int compute, int scale);
  Status (*matmul_destroy)(Descriptor);
  Status (*matmul_set)(Descriptor, int, const void*, size_t);
  Status (*layout_create)(Descriptor*, int type, uint64_t rows, uint64_t columns, int64_t leading);
  Status (*layout_destroy)(Descriptor);
  Status (*preference_create)(Descriptor*);
  Status (*preference_destroy)(Descriptor);
  Status (*preference_set)(Descriptor, int, const void*, size_t);
  Status (*heuristic)(Handle, Descriptor, Descriptor, Descriptor, Descriptor, Descriptor, Descriptor, int, Heuristic*, int*);
  Status (*matmul)(Handle, Descriptor, const void* alpha, const void* a, Descriptor, const void* b, Descriptor,
                   const void* beta, const void* c, Descriptor, void* d, Descriptor, const Algorithm*, void* workspace,
                   size_t, void* stream);
};

// What a product is told apart by: sizes, types, epilogue, and how far each address is aligned.
using Key = std::array<int64_t, 16>;

std::mutex mutex;
std::string path;
std::optional<Library> library;
bool looked = false;
std::map<int, Handle> handles;
std::map<Key, std::optional<Heuristic>> found;

// The one that PyTorch has loaded; without it nothing here runs.
const Library* loaded() {
  if (looked) return library ? &*library : nullptr;
  looked = true;
  void* from = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOW);
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
    if (!from && path.empty()) from = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
  if (!from) return nullptr;
  Library made{};
  bool all = true;
  const auto take = [&](auto& to, const char* name) {
    to = reinterpret_cast<std::decay_t<decltype(to)>>(dlsym(from, name));
    all = all && to;
  };
  take(made.create, "cublasLtCreate");
  take(made.matmul_create, "cublasLtMatmulDescCreate");
  take(made.matmul_destroy, "cublasLtMatmulDescDestroy");
  take(made.matmul_set, "cublasLtMatmulDescSetAttribute");
  take(made.layout_create, "cublasLtMatrixLayoutCreate");
  take(made.layout_destroy, "cublasLtMatrixLayoutDestroy");
  take(made.preference_create, "cublasLtMatmulPreferenceCreate");
  take(made.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  take(made.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  take(made.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  take(made.matmul, "cublasLtMatmul");
  if (all) library = made;
  return library ? &*library : nullptr;
}

// A descriptor that goes when it is left.
class Owned {
 public:
  explicit Owned(Status (*destroy)(Descriptor)) : destroy_(destroy) {}
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (made) destroy_(made);
  }
  Descriptor made = nullptr;

 private:
  Status (*destroy_)(Descriptor);
};

int type_of(const Tensor& t) {
  return t.scalar_type() == at::kFloat ? kReal32 : t.scalar_type() == at::kBFloat16 ? 14 : 2;
}

uint32_t alignment(const void* address) {
  uint32_t bytes = 256;
  while (reinterpret_cast<uintptr_t>(address) % bytes) bytes /= 2;
  return bytes;
}

// A row-major matrix as cuBLASLt sees it: its columns are the rows.
struct Matrix {
  const Tensor& t;
  uint64_t rows() const { return static_cast<uint64_t>(t.size(1)); }
  uint64_t columns() const { return static_cast<uint64_t>(t.size(0)); }
  int64_t leading() const { return t.size(0) == 1 ? t.size(1) : t.stride(0); }
};

bool takes(const Tensor& t, at::ScalarType type) {
  return t.scalar_type() == type && t.numel() && t.stride(-1) == 1 && (t.dim() < 2 || Matrix{t}.leading() >= t.size(1));
}

bool of_one_type(std::initializer_list<const Tensor*> tensors) {
  const auto type = (*tensors.begin())->scalar_type();
  if (type != at::kFloat && type != at::kBFloat16 && type != at::kHalf) return false;
  return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor* t) { return takes(*t, type); });
}

// d = a b with an epilogue, all as cuBLASLt sees them; transposed: b is. Whether it ran.
bool multiply(const Tensor& a, const Tensor& b, bool transposed_a, bool transposed_b, const Tensor& d, uint32_t epilogue,
              const Tensor& bias, const Tensor& aux) {
  const auto device = d.device();
  const c10::OptionalDeviceGuard guard(device.is_cuda() ? std::optional<c10::Device>(device) : std::nullopt);
  const std::lock_guard<std::mutex> lock(mutex);
  const Library* lt = loaded();
  if (!lt) return false;
  launch::make_current(device);
  Handle& handle = handles[device.index()];
  if (!handle && lt->create(&handle)) return false;
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  const bool tf32 = d.scalar_type() == at::kFloat && precision == at::Float32Precision::TF32;
  const int type = type_of(d), compute = tf32 ? kComputeTf32 : kCompute32;
  Owned operation(lt->matmul_destroy), as(lt->layout_destroy), bs(lt->layout_destroy), ds(lt->layout_destroy);
  const auto layout = [&](Owned& of, const Tensor& t) {
    const Matrix m{t};
    return !lt->layout_create(&of.made, type, m.rows(), m.columns(), m.leading());
  };
  if (lt->matmul_create(&operation.made, compute, kReal32) || !layout(as, a) || !layout(bs, b) || !layout(ds, d)) return false;
  const auto set = [&](int attribute, const auto& value) {
    return !lt->matmul_set(operation.made, attribute, &value, sizeof value);
  };
  const int32_t trans_a = transposed_a, trans_b = transposed_b;
  const void* sums = bias.data_ptr();
  if (!set(kTransA, trans_a) || !set(kTransB, trans_b) || !set(kEpilogue, epilogue) || !set(kBiasPointer, sums)) return false;
  if (aux.defined()) {
    const void* address = aux.data_ptr();
    const int64_t leading = Matrix{aux}.leading();
    if (!set(kAuxPointer, address) || !set(kAuxLeading, leading)) return false;
  }
  const std::array<uint32_t, 4> aligned{alignment(a.data_ptr()), alignment(b.data_ptr()), alignment(d.data_ptr()),
                                        alignment(d.data_ptr())};
  const Key key{device.index(), type, compute, epilogue, a.size(0), a.size(1), Matrix{a}.leading(), b.size(0), b.size(1),
                Matrix{b}.leading(), aligned[0], aligned[1], aligned[2], alignment(sums),
                aux.defined() ? Matrix{aux}.leading() : 0, aux.defined() ? alignment(aux.data_ptr()) : 0};
  auto known = found.find(key);
  if (known == found.end()) {
    Owned preference(lt->preference_destroy);
    if (lt->preference_create(&preference.made)) return false;
    bool all = !lt->preference_set(preference.made, kMostWorkspace, &kWorkspace, sizeof kWorkspace) &&
               !lt->preference_set(preference.made, kReductions, &kReduceInFp32, sizeof kReduceInFp32);
    for (int i = 0; i < 4; ++i)
      all = all && !lt->preference_set(preference.made, kAlignmentA + i, &aligned[static_cast<size_t>(i)], sizeof(uint32_t));
    Heuristic best{};
    int count = 0;
    all = all && !lt->heuristic(handle, operation.made, as.made, bs.made, ds.made, ds.made, preference.made, 1, &best, &count) &&
          count && !best.state;
    known = found.emplace(key, all ? std::optional<Heuristic>(best) : std::nullopt).first;
  }
  if (!known->second) return false;
  const Heuristic& best = *known->second;
  const Tensor workspace = at::empty({static_cast<int64_t>(best.workspace)}, d.options().dtype(at::kByte));
  void* stream = device.is_cuda()
                     ? c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle()
                     : nullptr;
  const float one = 1.f, zero = 0.f;
  const Status status = lt->matmul(handle, operation.made, &one, a.data_ptr(), as.made, b.data_ptr(), bs.made, &zero,
                                   d.data_ptr(), ds.made, d.data_ptr(), ds.made, &best.algorithm,
                                   workspace.data_ptr(), best.workspace, stream);
  if (status) known->second = std::nullopt;                                      // not asked again
  return !status;
}

// GELU and its gradient as epilogues are approximations: on an H100 off by 1e-5 of the largest element, which is within
// a rounding of bf16 and fp16, and five to ten times eager PyTorch's error in fp32.
bool sixteen_bits(const Tensor& t) { return t.scalar_type() != at::kFloat; }

}  // namespace

Pair linear_gelu(const Tensor& x, const Tensor& w, const Tensor& b) {
  if (!sixteen_bits(x) || !b.defined() || !of_one_type({&x, &w, &b}) || w.size(0) % 8) return std::nullopt;
  Tensor a = at::empty({x.size(0), w.size(0)}, x.options()), h = at::empty_like(a);
  if (!multiply(w, x, true, false, a, kGeluAuxBias, b, h)) return std::nullopt;
  return std::pair(a, h);
}

Pair product_gelu_backward(const Tensor& dy, const Tensor& w, const Tensor& h) {
  if (!sixteen_bits(dy) || !of_one_type({&dy, &w, &h}) || Matrix{h}.leading() % 8) return std::nullopt;
  Tensor dh = at::empty(h.sizes(), h.options()), sums = at::empty({h.size(1)}, h.options());
  if (!multiply(w, dy, false, false, dh, kGeluBackwardBias, sums, h)) return std::nullopt;
  return std::pair(dh, sums);
}

Pair weight_gradient(const Tensor& dy, const Tensor& x) {
  if (!of_one_type({&dy, &x})) return std::nullopt;
  Tensor made = at::empty({dy.size(1), x.size(1)}, x.options()), sums = at::empty({dy.size(1)}, x.options());
  if (!multiply(x, dy, false, true, made, kBiasGradientB, sums, Tensor())) return std::nullopt;
  return std::pair(made, sums);
}

void use(const std::string& other) {
  const std::lock_guard<std::mutex> lock(mutex);
  path = other;
  library.reset();
  looked = false;
  handles.clear();
  found.clear();
}

}  // namespace rfkernels::lt

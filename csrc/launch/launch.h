// Launches of kernels that Triton compiled, without Triton's own launcher: what it costs is a look into a table.
//
// A kernel is compiled, and found again, by what Triton specialises on: dtypes and 16-byte alignment of pointers, whether
// an integer is 1, a multiple of 16 or wide, and the compile-time constants. The first launch of each asks Python
// (rfkernels/launcher.py); Triton compiles it, and says which arguments the binary takes: the others are constants of it.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <functional>
#include <string>
#include <variant>
#include <vector>

namespace rfkernels::launch {

struct Kernel {
  const char *module, *name;
};

struct Grid {
  int64_t x, y = 1, z = 1;
};
constexpr int64_t kMostGrid = 65535;        // of y and of z

// An argument, or a compile-time constant. Tuples are flat here, with a mark where one begins and ends.
struct Value {
  enum Kind : uint8_t { kNone, kTensor, kInteger, kReal, kTruth, kText, kOpen, kClose };
  Kind kind = kNone;
  const at::Tensor* tensor = nullptr;       // has to live until the launch
  int64_t integer = 0;
  double real = 0.0;
  const char* text = nullptr;
};

struct Constant {
  const char* name;
  Value value;
};

class Call {
 public:
  // `like`: a tensor on the device that it runs on.
  Call(const Kernel& kernel, const at::Tensor& like) : kernel_(kernel), like_(like) {}

  Call& operator<<(const at::Tensor& t) { return push({t.defined() ? Value::kTensor : Value::kNone, &t}); }
  Call& operator<<(const std::optional<at::Tensor>& t) {
    return push(t ? Value{Value::kTensor, &*t} : Value{});
  }
  Call& operator<<(int64_t i) { return push({Value::kInteger, nullptr, i}); }
  Call& operator<<(double d) { return push({Value::kReal, nullptr, 0, d}); }
  // A tuple of tensors, or of numbers.
  template <typename T>
  Call& operator<<(const std::vector<T>& items) {
    push({Value::kOpen});
    for (const T& item : items) *this << item;
    return push({Value::kClose});
  }
  template <typename T>
  Call& all(const T& items) {
    for (const auto item : items) *this << static_cast<int64_t>(item);
    return *this;
  }

  Call& with(const char* name, int64_t i) { return constant(name, {Value::kInteger, nullptr, i}); }
  Call& with(const char* name, int i) { return with(name, static_cast<int64_t>(i)); }
  Call& with(const char* name, bool b) { return constant(name, {Value::kTruth, nullptr, b}); }
  Call& with(const char* name, double d) { return constant(name, {Value::kReal, nullptr, 0, d}); }
  Call& with(const char* name, const char* text) { return constant(name, {Value::kText, nullptr, 0, 0.0, text}); }

  void run(Grid grid) const;

  static constexpr size_t kMost = 256;
  const Kernel& kernel() const { return kernel_; }
  const Value* begin() const { return values_.data(); }
  const Value* end() const { return values_.data() + count_; }
  const Constant* constants_begin() const { return constants_.data(); }
  const Constant* constants_end() const { return constants_.data() + constant_count_; }

  Call& push(const Value& value) {
    TORCH_INTERNAL_ASSERT(count_ < kMost);
    values_[count_++] = value;
    return *this;
  }

 private:
  Call& constant(const char* name, const Value& value) {
    TORCH_INTERNAL_ASSERT(constant_count_ < constants_.size());
    constants_[constant_count_++] = {name, value};
    return *this;
  }

  Kernel kernel_;
  const at::Tensor& like_;
  size_t count_ = 0, constant_count_ = 0;
  std::array<Value, kMost> values_;
  std::array<Constant, 24> constants_;
};

// What Triton made of a call: the driver's handle, threads of a block, bytes of shared memory, and for each argument, in
// order, how the binary takes it: '-' not at all, 'p' a pointer, 'i' and 'l' an integer of 4 and 8 bytes, 'f' and 'd' a real.
struct Compiled {
  void* function = nullptr;
  unsigned threads = 0, shared = 0;
  std::string takes;
};

// Asked once for each specialisation, and for each setting; set by python.cpp.
extern std::function<Compiled(const Call&)> compile_in_python;
extern std::function<std::vector<int64_t>(const char* name, int64_t, const at::Tensor& like)> settings_in_python;

// Settings of a kernel by the launch tables, for this many channels (or heads of this size) and like's dtype and device.
const std::vector<int64_t>& settings(const char* name, int64_t size, const at::Tensor& like);

// Gives a thread that has done nothing on a GPU yet its context.
void make_current(c10::Device device);
// Launches on the tensors' device and its current stream. arguments: a pointer to each.
void start(const char* name, void* function, c10::Device device, Grid grid, unsigned threads, unsigned shared,
           void** arguments);
// The driver's: a module from a binary in memory, a kernel of it.
void* load_module(const void* image);
void* module_function(void* module, const char* name);

// Forgets what was compiled and which settings were asked for.
void forget();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace rfkernels::launch

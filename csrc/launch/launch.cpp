#include "launch.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <unordered_map>

namespace rfkernels::launch {

std::function<Compiled(const Call&)> compile_in_python;
std::function<std::vector<int64_t>(const char*, int64_t, const at::Tensor&)> settings_in_python;

namespace {

// The driver's own types, as far as they are needed: cuda.h is no part of PyTorch.
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};
using LaunchKernelEx = int (*)(const Config*, void*, void**, void**);
using GetErrorString = int (*)(int, const char**);
using ModuleLoadData = int (*)(void**, const void*);
using ModuleGetFunction = int (*)(void**, void*, const char*);

struct Driver {
  LaunchKernelEx launch = nullptr;
  GetErrorString describe = nullptr;
  int (*current)(void**) = nullptr;
  int (*device)(int*, int) = nullptr;
  int (*retain)(void**, int) = nullptr;
  int (*set_current)(void*) = nullptr;
  ModuleLoadData load = nullptr;
  ModuleGetFunction find = nullptr;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    TORCH_CHECK(library, "the CUDA driver does not load: ", dlerror());
    launch = reinterpret_cast<LaunchKernelEx>(dlsym(library, "cuLaunchKernelEx"));
    describe = reinterpret_cast<GetErrorString>(dlsym(library, "cuGetErrorString"));
    current = reinterpret_cast<int (*)(void**)>(dlsym(library, "cuCtxGetCurrent"));
    device = reinterpret_cast<int (*)(int*, int)>(dlsym(library, "cuDeviceGet"));
    retain = reinterpret_cast<int (*)(void**, int)>(dlsym(library, "cuDevicePrimaryCtxRetain"));
    set_current = reinterpret_cast<int (*)(void*)>(dlsym(library, "cuCtxSetCurrent"));
    load = reinterpret_cast<ModuleLoadData>(dlsym(library, "cuModuleLoadData"));
    find = reinterpret_cast<ModuleGetFunction>(dlsym(library, "cuModuleGetFunction"));
    TORCH_CHECK(launch && describe && current && device && retain && set_current && load && find,
                "the CUDA driver has no cuLaunchKernelEx: it is older than 11.8");
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

void check(int error, const char* what, const char* happened) {
  if (!error) return;
  const char* text = nullptr;
  driver().describe(error, &text);
  TORCH_CHECK(false, what, ": ", happened, ": ", text ? text : "unknown error", " (", error, ")");
}

std::mutex mutex;
std::unordered_map<std::string, Compiled> compiled;
std::map<std::tuple<const char*, int64_t, at::ScalarType, int>, std::vector<int64_t>> known;

void append(std::string& key, const void* bytes, size_t size) { key.append(static_cast<const char*>(bytes), size); }

void append(std::string& key, const Value& value, bool constant) {
  key.push_back(static_cast<char>(value.kind));
  switch (value.kind) {
    case Value::kTensor: {
      const auto address = reinterpret_cast<uintptr_t>(value.tensor->data_ptr());
      key.push_back(static_cast<char>(static_cast<int>(value.tensor->scalar_type()) << 1 | (address % 16 == 0)));
      break;
    }
    case Value::kInteger:
      if (constant) {
        append(key, &value.integer, sizeof value.integer);
      } else {
        const int64_t i = value.integer;
        key.push_back(static_cast<char>((i == 1) | (i % 16 == 0) << 1 | (i != static_cast<int32_t>(i)) << 2));
      }
      break;
    case Value::kTruth: key.push_back(value.integer ? 1 : 0); break;
    case Value::kReal:
      if (constant) append(key, &value.real, sizeof value.real);
      break;
    case Value::kText: key.append(value.text); break;
    default: break;
  }
}

const Compiled& find(const Call& call, int device) {
  thread_local std::string key;
  key.clear();
  append(key, &call.kernel().name, sizeof(const char*));
  append(key, &device, sizeof device);
  for (const Value& value : call) append(key, value, false);
  for (auto it = call.constants_begin(); it != call.constants_end(); ++it) append(key, it->value, true);
  {
    const std::lock_guard<std::mutex> guard(mutex);
    const auto found = compiled.find(key);
    if (found != compiled.end()) return found->second;
  }
  const std::string mine = key;
  Compiled made = compile_in_python(call);  // without the lock: Python may let another thread run
  const std::lock_guard<std::mutex> guard(mutex);
  return compiled.emplace(mine, std::move(made)).first->second;
}

}  // namespace

// A thread that has done nothing on a GPU yet has no context; allocations may all come from a cache.
void make_current(c10::Device device) {
  thread_local int done = -1;
  if (!device.is_cuda() || done == device.index()) return;
  void *now = nullptr, *context = nullptr;
  int number = 0;
  driver().current(&now);
  if (!now && !driver().device(&number, device.index()) && !driver().retain(&context, number))
    driver().set_current(context);
  done = device.index();
}

void Call::run(Grid grid) const {
  if (!grid.x || !grid.y || !grid.z) return;
  const auto device = like_.device();
  const c10::OptionalDeviceGuard guard(device.is_cuda() ? std::optional<c10::Device>(device) : std::nullopt);
  make_current(device);
  const Compiled& to = find(*this, device.index());
  std::array<uint64_t, kMost + 2> room;
  std::array<void*, kMost + 2> arguments;
  size_t count = 0, leaf = 0;
  for (const Value& value : *this) {
    if (value.kind == Value::kOpen || value.kind == Value::kClose) continue;
    const char as = to.takes[leaf++];
    if (as == '-') continue;
    uint64_t& at = room[count];
    if (as == 'p') {
      at = reinterpret_cast<uint64_t>(value.tensor->data_ptr());
    } else if (as == 'f') {
      const float narrow = static_cast<float>(value.real);
      std::memcpy(&at, &narrow, sizeof narrow);
    } else if (as == 'd') {
      std::memcpy(&at, &value.real, sizeof value.real);
    } else {
      at = static_cast<uint64_t>(value.integer);  // of 'i' the driver reads the lower half
    }
    arguments[count] = &at;
    ++count;
  }
  for (int scratch = 0; scratch < 2; ++scratch) {  // the compiler's own memory: none
    room[count] = 0;
    arguments[count] = &room[count];
    ++count;
  }
  start(kernel_.name, to.function, device, grid, to.threads, to.shared, arguments.data());
}

void start(const char* name, void* function, c10::Device device, Grid grid, unsigned threads, unsigned shared,
           void** arguments) {
  Config config{{static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)},
                {threads, 1, 1}, shared, nullptr, nullptr, 0};
  if (device.is_cuda())
    config.stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
  check(driver().launch(&config, function, arguments, nullptr), name, "the launch failed");
}

void* load_module(const void* image) {
  void* module = nullptr;
  check(driver().load(&module, image), "the CUDA kernels", "they do not load");
  return module;
}

void* module_function(void* module, const char* name) {
  void* function = nullptr;
  check(driver().find(&function, module, name), name, "it is not in the binary");
  return function;
}

const std::vector<int64_t>& settings(const char* name, int64_t size, const at::Tensor& like) {
  const auto key = std::make_tuple(name, size, like.scalar_type(), static_cast<int>(like.device().index()));
  {
    const std::lock_guard<std::mutex> guard(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
  }
  auto made = settings_in_python(name, size, like);
  const std::lock_guard<std::mutex> guard(mutex);
  return known.emplace(key, std::move(made)).first->second;
}

void forget() {
  const std::lock_guard<std::mutex> guard(mutex);
  compiled.clear();
  known.clear();
}

}  // namespace rfkernels::launch

#include "modules.h"

#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>

namespace rfkernels::launch {
namespace {

std::mutex guarding;
std::map<int, std::string> binaries;
std::map<int, std::pair<std::unique_ptr<std::string>, void*>> modules;  // an image has to outlive its module
std::map<std::pair<int, std::string>, void*> functions;

void* function_of(const std::string& name, int device) {
  const std::lock_guard<std::mutex> guard(guarding);
  if (const auto found = functions.find({device, name}); found != functions.end()) return found->second;
  auto& [image, module] = modules[device];
  if (!module) {
    const auto path = binaries.find(device);
    TORCH_CHECK(path != binaries.end(), name, ": no CUDA kernels were built for this GPU");
    std::ifstream file(path->second, std::ios::binary);
    image = std::make_unique<std::string>(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    module = load_module(image->data());
  }
  return functions[{device, name}] = module_function(module, name.c_str());
}

}  // namespace

void binary_for(int device, const std::string& path) {
  const std::lock_guard<std::mutex> guard(guarding);
  binaries[device] = path;
}

void run_by_name(const std::string& name, const at::Tensor& like, Grid grid, unsigned threads, void* arguments) {
  const auto device = like.device();
  const c10::OptionalDeviceGuard guard(device.is_cuda() ? std::optional<c10::Device>(device) : std::nullopt);
  make_current(device);
  start(name.c_str(), function_of(name, device.index()), device, grid, threads, 0, &arguments);
}

}  // namespace rfkernels::launch

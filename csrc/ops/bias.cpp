#include "bias.h"

#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

namespace rfkernels {
namespace {

struct Given {
  c10::weak_intrusive_ptr<c10::TensorImpl> gradient;
  uint32_t version;
  at::Tensor sums;
};

std::mutex mutex;

std::unordered_map<const c10::TensorImpl*, Given>& handed_over() {
  static auto* made = new std::unordered_map<const c10::TensorImpl*, Given>;  // outlives what is torn down at exit
  return *made;
}

constexpr size_t kMost = 64;  // of gradients on their way; what nobody took is forgotten beyond

}  // namespace

void give_sums(const at::Tensor& gradient, const at::Tensor& sums) {
  std::vector<Given> dropped;                // ends after the lock: a tensor that Python holds takes Python's lock to go
  const std::lock_guard<std::mutex> guard(mutex);
  auto& all = handed_over();
  const auto drop = [&](auto it) {
    dropped.push_back(std::move(it->second));
    return all.erase(it);
  };
  if (all.size() >= kMost)
    for (auto it = all.begin(); it != all.end();) it = it->second.gradient.expired() ? drop(it) : std::next(it);
  if (const auto before = all.find(gradient.unsafeGetTensorImpl()); before != all.end()) drop(before);
  all.emplace(gradient.unsafeGetTensorImpl(),
              Given{c10::weak_intrusive_ptr<c10::TensorImpl>(gradient.getIntrusivePtr()),
                    static_cast<uint32_t>(gradient._version()), sums});
}

at::Tensor take_sums(const at::Tensor& gradient) {
  std::optional<Given> taken;
  {
    const std::lock_guard<std::mutex> guard(mutex);
    auto& all = handed_over();
    const auto found = all.find(gradient.unsafeGetTensorImpl());
    if (found == all.end()) return {};
    taken = std::move(found->second);
    all.erase(found);
  }
  const Given& kept = *taken;
  const bool same = !kept.gradient.expired() && kept.version == static_cast<uint32_t>(gradient._version());
  return same ? kept.sums : at::Tensor();
}

}  // namespace rfkernels

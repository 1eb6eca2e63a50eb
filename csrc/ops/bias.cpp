#include "bias.h"

#include <mutex>
#include <unordered_map>

namespace rfkernels {
namespace {

struct Given {
  c10::weak_intrusive_ptr<c10::TensorImpl> gradient;
  uint32_t version;
  at::Tensor sums;
};

std::mutex mutex;

std::unordered_map<const c10::TensorImpl*, Given>& given() {
  static auto* made = new std::unordered_map<const c10::TensorImpl*, Given>;  // outlives what is torn down at exit
  return *made;
}

constexpr size_t kMost = 64;  // of gradients on their way; what nobody took is forgotten beyond

}  // namespace

void give_sums(const at::Tensor& gradient, const at::Tensor& sums) {
  const std::lock_guard<std::mutex> guard(mutex);
  auto& all = given();
  if (all.size() >= kMost)
    for (auto it = all.begin(); it != all.end();) it = it->second.gradient.expired() ? all.erase(it) : std::next(it);
  all.insert_or_assign(gradient.unsafeGetTensorImpl(),
                       Given{c10::weak_intrusive_ptr<c10::TensorImpl>(gradient.getIntrusivePtr()),
                             static_cast<uint32_t>(gradient._version()), sums});
}

at::Tensor take_sums(const at::Tensor& gradient) {
  const std::lock_guard<std::mutex> guard(mutex);
  auto& all = given();
  const auto found = all.find(gradient.unsafeGetTensorImpl());
  if (found == all.end()) return {};
  const Given kept = std::move(found->second);
  all.erase(found);
  const bool same = !kept.gradient.expired() && kept.version == static_cast<uint32_t>(gradient._version());
  return same ? kept.sums : at::Tensor();
}

}  // namespace rfkernels

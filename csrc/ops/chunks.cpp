#include "chunks.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>

namespace rfkernels {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The gradient of one modulation, while a backward is filling it. Each backward gets a tensor of its own.
struct Gradient {
  c10::SmallVector<int64_t, 3> sizes;
  at::TensorOptions options;
  int64_t count;
  std::mutex mutex;
  int task = -1;
  std::set<int64_t> taken;
  Tensor buffer;

  Gradient(const Tensor& modulation, int64_t n)
      : sizes(modulation.sizes().begin(), modulation.sizes().end()), options(modulation.options()), count(n) {}

  int64_t pitch() const { return sizes.back(); }

  // Part i, the first time it is asked for: a chunk that two ops read gets a gradient from each.
  Tensor take(int64_t i, int64_t width) {
    const std::lock_guard<std::mutex> guard(mutex);
    const int here = torch::autograd::get_current_graph_task_id();
    if (!buffer.defined() || here != task) {
      buffer = at::empty(sizes, options);
      task = here;
      taken.clear();
    }
    if (!taken.insert(i).second) return {};
    return buffer.as_strided({sizes.front(), width}, {pitch(), 1}, buffer.storage_offset() + i * width);
  }

  // All of it, and which parts ops were given to write in this backward; nothing if none was.
  std::pair<Tensor, std::set<int64_t>> finish() {
    const std::lock_guard<std::mutex> guard(mutex);
    const bool here = buffer.defined() && task == torch::autograd::get_current_graph_task_id();
    Tensor whole = here ? std::move(buffer) : Tensor();
    buffer = Tensor();
    return {whole, here ? std::move(taken) : std::set<int64_t>()};
  }
};

struct Part {
  std::shared_ptr<Gradient> gradient;
  int64_t i;
};

// Chunks that live, by their address.
struct Alive {
  std::mutex mutex;
  std::unordered_map<const void*, std::weak_ptr<Part>> parts;
  size_t purge_at = 256;

  void add(const void* address, const std::shared_ptr<Part>& part) {
    parts[address] = part;
    if (parts.size() < purge_at) return;
    for (auto it = parts.begin(); it != parts.end();) it = it->second.expired() ? parts.erase(it) : std::next(it);
    purge_at = std::max<size_t>(256, 2 * parts.size());
  }
};

Alive& alive() {
  static Alive* made = new Alive;  // outlives what is torn down at exit
  return *made;
}

struct Parts : torch::CustomClassHolder {
  std::shared_ptr<Gradient> gradient;
  std::vector<std::shared_ptr<Part>> parts;
};

struct Chunks : torch::autograd::Function<Chunks> {
  static variable_list forward(AutogradContext* ctx, const Tensor& modulation, int64_t count) {
    auto parts = c10::make_intrusive<Parts>();
    parts->gradient = std::make_shared<Gradient>(modulation, count);
    variable_list chunks = modulation.chunk(count, -1);
    {
      const std::lock_guard<std::mutex> guard(alive().mutex);
      for (int64_t i = 0; i < count; ++i) {
        parts->parts.push_back(std::make_shared<Part>(Part{parts->gradient, i}));
        alive().add(chunks[i].data_ptr(), parts->parts.back());
      }
    }
    ctx->saved_data["parts"] = c10::IValue::make_capsule(std::move(parts));
    ctx->set_materialize_grads(false);
    return chunks;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto holder = ctx->saved_data["parts"].toCapsule();
    Gradient& gradient = *static_cast<Parts*>(holder.get())->gradient;
    const int64_t count = gradient.count, width = gradient.pitch() / count;
    auto [whole, taken] = gradient.finish();
    const auto part = [&, &whole = whole](int64_t i) { return whole.narrow(-1, i * width, width); };
    bool in_place = whole.defined();
    for (const int64_t i : taken)
      in_place = in_place && grads[i].defined() && grads[i].data_ptr() == part(i).data_ptr() &&
                 grads[i].stride(0) == part(i).stride(0);
    if (!in_place) {
      // None is in place, as of a graph of gradients; or a part is a sum of several uses, or was written for a chunk of
      // the same memory that another call made, which still needs it: nothing of it may be touched.
      c10::SmallVector<int64_t, 3> shape = gradient.sizes;
      shape.back() = width;
      for (Tensor& grad : grads)
        if (!grad.defined()) grad = at::zeros({}, gradient.options).expand(shape);
      return {at::cat(grads, -1), Tensor()};
    }
    for (int64_t i = 0; i < count; ++i) {
      if (!grads[i].defined())
        part(i).zero_();
      else if (!taken.count(i))
        part(i).copy_(grads[i]);  // from another op
    }
    return {whole, Tensor()};
  }
};

}  // namespace

variable_list chunk_modulation(const Tensor& modulation, int64_t count) { return Chunks::apply(modulation, count); }

Tensor gradient_of(const Tensor& vector, bool in_chunks) {
  if (in_chunks && vector.dim() == 2) {
    std::shared_ptr<Part> part;
    {
      const std::lock_guard<std::mutex> guard(alive().mutex);
      const auto found = alive().parts.find(vector.data_ptr());
      if (found != alive().parts.end()) part = found->second.lock();
    }
    if (part) {
      Gradient& gradient = *part->gradient;
      const int64_t width = vector.size(1), pitch = vector.size(0) == 1 ? gradient.pitch() : vector.stride(0);
      if (gradient.sizes.front() == vector.size(0) && gradient.pitch() == pitch && gradient.count * width == pitch &&
          gradient.options.dtype() == vector.dtype())
        if (Tensor made = gradient.take(part->i, width); made.defined()) return made;
    }
  }
  return at::empty(vector.sizes(), vector.options());
}

}  // namespace rfkernels

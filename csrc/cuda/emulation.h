// A CUDA block on a CPU: its threads are fibers that run one after another from barrier to barrier, in an order that is
// given. Shared memory begins as NaN, and each access is looked at: two threads that touch a word between the same two
// barriers, one of them writing, are a race, whatever the values come out as.
//
// Not modelled: asynchronous copies, warps that diverge around a shuffle, the memory model.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Access {
  int writer = -1, reader = -1;
  long write_epoch = -1, read_epoch = -1;
  bool several_readers = false;
};

struct Array {
  std::vector<char> bytes;
  std::vector<Access> accesses;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  long epoch = 0;                            // barriers of the block that it has passed
  long shuffles = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current = 0;
inline std::map<std::string, Array> shared;  // of this block, by name
inline std::vector<std::vector<float>> lanes;
inline std::vector<std::string> races;
inline std::function<void()> body;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

// All fibers stop here; the scheduler goes round, so that everybody has come this far before anybody goes on.
inline void barrier() {
  ++fibers[current].epoch;
  yield();
}

// A shuffle of a warp: everybody writes, everybody has written when a fiber runs again, everybody reads. Two buffers, so
// that who reads late still finds what was meant for him.
inline float from_lane_xor(float value, int mask) {
  Fiber& me = fibers[current];
  const int use = static_cast<int>(me.shuffles++ & 1);
  lanes[use][current] = value;
  yield();
  return lanes[use][current ^ mask];
}

inline void look(const std::string& name, Array& array, size_t word, bool write) {
  Access& a = array.accesses[word];
  const long epoch = fibers[current].epoch;
  const bool with_writer = a.writer >= 0 && a.writer != current && a.write_epoch == epoch;
  const bool with_reader = write && a.read_epoch == epoch && (a.several_readers || (a.reader >= 0 && a.reader != current));
  if ((with_writer || with_reader) && races.size() < 20)
    races.push_back(name + "[" + std::to_string(word) + "]: threads " + std::to_string(current) + " and " +
                    std::to_string(with_writer ? a.writer : a.reader) + " without a barrier between them");
  if (write) {
    a.writer = current;
    a.write_epoch = epoch;
  } else {
    a.several_readers = a.read_epoch == epoch && (a.several_readers || a.reader != current);
    a.reader = current;
    a.read_epoch = epoch;
  }
}

template <typename T>
class Shared {
 public:
  Shared(const char* name, size_t count) : name_(name) {
    Array& made = shared[name];
    if (!made.bytes.empty()) return;
    made.bytes.resize(count * sizeof(T));
    made.accesses.resize(count);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (size_t i = 0; i + sizeof nan <= made.bytes.size(); i += sizeof nan) std::memcpy(&made.bytes[i], &nan, sizeof nan);
  }
  class Word {
   public:
    Word(const std::string& name, size_t i) : name_(name), i_(i) {}
    operator T() const {
      Array& array = shared[name_];
      look(name_, array, i_, false);
      T value;
      std::memcpy(&value, &array.bytes[i_ * sizeof(T)], sizeof value);
      return value;
    }
    void operator=(T value) const {
      Array& array = shared[name_];
      look(name_, array, i_, true);
      std::memcpy(&array.bytes[i_ * sizeof(T)], &value, sizeof value);
    }

   private:
    const std::string& name_;
    size_t i_;
  };
  Word operator[](size_t i) const { return Word(name_, i); }

 private:
  std::string name_;
};

inline void enter() {
  body();
  fibers[current].done = true;
  yield();
}

// Runs a kernel on a grid. order: 0 forwards, 1 backwards, more: a shuffle with that seed.
inline void run(Index grid, unsigned threads, int order, const std::function<void()>& kernel) {
  body = kernel;
  blockDim = {threads, 1, 1};
  gridDim = grid;
  std::vector<int> turn(threads);
  for (unsigned i = 0; i < threads; ++i) turn[i] = static_cast<int>(order == 1 ? threads - 1 - i : i);
  for (unsigned i = threads - 1, seed = static_cast<unsigned>(order); order > 1 && i; --i) {
    seed = seed * 1664525u + 1013904223u;
    std::swap(turn[i], turn[(seed >> 8) % (i + 1)]);
  }
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        shared.clear();
        lanes.assign(2, std::vector<float>(threads));
        fibers.assign(threads, Fiber());
        for (Fiber& fiber : fibers) {
          fiber.stack.resize(64 << 10);
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.data();
          fiber.context.uc_stack.ss_size = fiber.stack.size();
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, enter, 0);
        }
        for (size_t left = threads; left;) {
          left = 0;
          for (const int i : turn) {
            if (fibers[i].done) continue;
            current = i;
            threadIdx = {static_cast<unsigned>(i), 0, 0};
            blockIdx = {x, y, z};
            swapcontext(&scheduler, &fibers[i].context);
            left += !fibers[i].done;
          }
        }
      }
}

inline uint32_t round16(float value, bool bf16) {
  if (bf16) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

inline float from_f16(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

}  // namespace emulation

// CUDA's names for a plain C++ compiler: the kernels of csrc/include run on the CPU, thread by thread.
//
// Blocks run one after the other. The threads of a block are fibres that run until they meet a barrier or a warp
// exchange, so that a barrier not all threads reach, or an exchange in divergent code, stops with an error instead of
// passing. 16-byte accesses check their alignment. The layouts of mma and movmatrix are those of the PTX manual.
#pragma once

#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define EMO_DEVICE inline
#define EMO_HOST_DEVICE inline
#define EMO_KERNEL(threads, blocks_per_sm) void
#define EMO_SHARED static
#define EMO_PARAMS(type) const type

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx;

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulator {

inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// The threads of one block.
class Block {
 public:
  static constexpr size_t kStack = 256 * 1024;

  void run(int threads, const std::function<void()>& body) {
    body_ = &body;
    if (stacks_.size() < size_t(threads) * kStack) stacks_.resize(size_t(threads) * kStack);
    state_.assign(threads, State::ready);
    fibres_.resize(threads);
    for (int i = 0; i < threads; ++i) {
      getcontext(&fibres_[i]);
      fibres_[i].uc_stack.ss_sp = &stacks_[i * kStack];
      fibres_[i].uc_stack.ss_size = kStack;
      fibres_[i].uc_link = &scheduler_;
      makecontext(&fibres_[i], &Block::enter, 0);
    }
    current_ = this;
    while (step()) {
    }
  }

  enum class State { ready, at_warp_barrier, at_block_barrier, done };

  void wait(State where) {
    const int me = active_;
    state_[me] = where;
    swapcontext(&fibres_[me], &scheduler_);
  }

  uint32_t exchange[8][32][6];
  static inline Block* current_ = nullptr;
  int lane() const { return active_ % 32; }
  int warp() const { return active_ / 32; }

 private:
  static void enter() {
    Block* block = current_;
    (*block->body_)();
    block->state_[block->active_] = State::done;
  }

  // Runs every thread that can run, then opens the barriers that are complete. False when all are done.
  bool step() {
    const int threads = int(state_.size());
    bool progress = false;
    for (int i = 0; i < threads; ++i) {
      if (state_[i] != State::ready) continue;
      progress = true;
      active_ = i;
      threadIdx.x = i;
      swapcontext(&scheduler_, &fibres_[i]);
    }
    int done = 0, waiting = 0;
    for (State state : state_) {
      done += state == State::done;
      waiting += state == State::at_block_barrier;
    }
    if (done == threads) return false;
    if (waiting == threads) {
      state_.assign(threads, State::ready);
      return true;
    }
    for (int warp = 0; warp < threads / 32; ++warp) {
      int arrived = 0;
      for (int lane = 0; lane < 32; ++lane) arrived += state_[warp * 32 + lane] == State::at_warp_barrier;
      if (arrived == 32) {
        progress = true;
        for (int lane = 0; lane < 32; ++lane) state_[warp * 32 + lane] = State::ready;
      }
    }
    if (!progress) fail("threads wait for others that never come: a divergent barrier or warp exchange");
    return true;
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<char> stacks_;
  std::vector<ucontext_t> fibres_;
  std::vector<State> state_;
  ucontext_t scheduler_;
  int active_ = 0;
};

// Every lane shows N words to its warp, then `read(words of lane)` gives the result.
template <int N, typename Read> auto exchange(const std::array<uint32_t, N>& mine, Read read) {
  Block& block = *Block::current_;
  auto& words = block.exchange[block.warp()];
  std::memcpy(words[block.lane()], mine.data(), sizeof(uint32_t) * N);
  block.wait(Block::State::at_warp_barrier);
  const auto result = read(words, block.lane());
  block.wait(Block::State::at_warp_barrier);
  return result;
}

inline void launch(int64_t blocks_x, int64_t blocks_y, int threads, const std::function<void()>& body) {
  static Block block;
  for (int64_t y = 0; y < blocks_y; ++y) {
    for (int64_t x = 0; x < blocks_x; ++x) {
      blockIdx.x = unsigned(x);
      blockIdx.y = unsigned(y);
      block.run(threads, body);
    }
  }
}

template <typename To, typename From> To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace emulator

namespace emokernels {

struct half_t {
  _Float16 value;
};
struct bf16_t {
  uint16_t value;
};

inline float to_float(float x) { return x; }
inline float to_float(half_t x) { return float(x.value); }
inline float to_float(bf16_t x) { return emulator::bits<float>(uint32_t(x.value) << 16); }

template <typename T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline half_t from_float<half_t>(float x) { return half_t{_Float16(x)}; }
template <> inline bf16_t from_float<bf16_t>(float x) {
  const uint32_t word = emulator::bits<uint32_t>(x);
  if (x != x) return bf16_t{uint16_t((word >> 16) | 0x40)};
  return bf16_t{uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16)};
}

inline uint4 load16(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulator::fail("a 16-byte load from an unaligned address");
  return *static_cast<const uint4*>(address);
}
inline void store16(void* address, uint4 value) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulator::fail("a 16-byte store to an unaligned address");
  *static_cast<uint4*>(address) = value;
}

inline void store8(void* address, uint2 value) {
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0) emulator::fail("an 8-byte store to an unaligned address");
  std::memcpy(address, &value, sizeof(value));
}

inline float fast_divide(float x, float y) { return x / y; }
inline void forget_memory() {}
inline void sync_block() { emulator::Block::current_->wait(emulator::Block::State::at_block_barrier); }

inline float shuffle_xor(float x, int lanes) {
  return emulator::exchange<1>({emulator::bits<uint32_t>(x)}, [lanes](const auto& words, int lane) {
    return emulator::bits<float>(words[lane ^ lanes][0]);
  });
}

inline uint32_t byte_permute(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = (uint64_t(y) << 32) | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  return result;
}

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

inline uint16_t half_of(uint32_t word, int index) { return uint16_t(word >> (16 * index)); }

inline uint32_t transpose8x8(uint32_t x) {
  return emulator::exchange<1>({x}, [](const auto& words, int lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    uint32_t result = 0;
    for (int i = 0; i < 2; ++i) {
      // Element [row][column + i] of the transpose is [column + i][row] of the matrix.
      result |= uint32_t(half_of(words[(column + i) * 4 + row / 2][0], row % 2)) << (16 * i);
    }
    return result;
  });
}

template <typename T> void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto product = emulator::exchange<6>({a[0], a[1], a[2], a[3], b0, b1}, [](const auto& words, int lane) {
    std::array<float, 4> sums{};
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        const uint16_t x = half_of(words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
        const uint16_t y = half_of(words[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
        sums[i] += to_float(emulator::bits<T>(x)) * to_float(emulator::bits<T>(y));
      }
    }
    return sums;
  });
  for (int i = 0; i < 4; ++i) d[i] += product[i];
}

}  // namespace emokernels

// What the kernels share: vector loads and stores with fp32 arithmetic behind them, and sums over a team of threads.
#pragma once

#include <cuda_fp16.h>

namespace qvl::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxWarps = 32;

// N numbers in registers. Storage is T, arithmetic is fp32: Pascal (6.1) runs fp16 arithmetic at 1/64 of its fp32 rate.
template <int N>
struct Floats {
  float at[N];
};

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

// Accesses of up to 16 bytes, to which p is aligned: one, or two where N floats accompany N halves.
template <class T, int N>
__device__ Floats<N> load(const T* p) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
  Floats<N> x;
#pragma unroll
  for (int i = 0; i < N; ++i) x.at[i] = static_cast<float>(pack.at[i]);
  return x;
}

template <class T, int N>
__device__ void store(T* p, const Floats<N>& x) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.at[i] = static_cast<T>(x.at[i]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

template <class T>
__device__ float rounded_to(float x) {
  return static_cast<float>(static_cast<T>(x));
}

// The butterfly gives every lane the same bits, in an order that never changes.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// A team is the blockDim.x threads with one threadIdx.y: a warp, or the whole block (then blockDim.y is 1).
// Sums one number over the team and gives the total to each of its threads. A team of one warp needs no barrier, so
// other teams of its block may have left. Consecutive sums alternate between two rows of `partial`: one barrier a sum
// is then enough, because a thread that writes a row again has passed the barrier that all readers of it reached later.
class TeamSum {
 public:
  using Partial = float[2][kMaxWarps];

  __device__ explicit TeamSum(Partial& partial) : partial_(partial) {}

  __device__ float operator()(float x) {
    x = warp_sum(x);
    if (blockDim.x <= 32) return x;
    float* row = partial_[turn_];
    turn_ ^= 1;
    const unsigned lane = threadIdx.x % 32;
    if (lane == 0) row[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? row[lane] : 0.0f);
  }

 private:
  Partial& partial_;
  int turn_ = 0;
};

}  // namespace qvl::cuda

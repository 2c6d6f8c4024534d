// What every kernel here shares: one warp works on one row, 16 bytes a lane where rows allow it.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../element_types.h"

namespace moesys {

constexpr int WARP = 32;
constexpr int WARPS_PER_BLOCK = 8;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Makes the tensor's device current while it lives; kernels go to torch's current stream there.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // kernel(args..., num_items), one warp for each item.
  template <typename... Parameters, typename... Args>
  void warp_per_item(void (*kernel)(Parameters...), int64_t num_items, Args... args) const {
    if (num_items == 0) return;
    const int64_t blocks = (num_items + WARPS_PER_BLOCK - 1) / WARPS_PER_BLOCK;
    STD_TORCH_CHECK(blocks <= INT32_MAX, "moesys: too many rows for one launch");
    kernel<<<static_cast<unsigned>(blocks), WARPS_PER_BLOCK * WARP, 0, stream_>>>(args...,
                                                                                  num_items);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

__device__ __forceinline__ int64_t warp_index() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
}

__device__ __forceinline__ int lane_index() { return threadIdx.x % WARP; }

// W elements moved by one instruction.
template <typename T, int W>
struct alignas(sizeof(T) * W) Pack {
  T value[W];
};

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Calls kernel.template operator()<W>(): 16 bytes of T when rows of `width` elements and every base
// pointer allow it, else one element.
template <typename T, typename Kernel, typename... Pointers>
void for_pack_width(int64_t width, const Kernel& kernel, Pointers... pointers) {
  constexpr int wide = 16 / sizeof(T);
  if (width % wide == 0 && (is_aligned(pointers, 16) && ...)) {
    kernel.template operator()<wide>();
  } else {
    kernel.template operator()<1>();
  }
}

}  // namespace moesys

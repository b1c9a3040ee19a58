// CUDA, on a card without tensor cores. Those with them take the same operations.

#include "check.h"

#define FLASH_ATTN_AVAILABLE
#define FATTN_KQ_STRIDE           256
#define GGML_CUDA_CC_ADA_LOVELACE 890
#ifndef QK_K
#define QK_K 256
#endif

struct ggml_backend_cuda_device_context      { int device; };
struct ggml_backend_cuda_buffer_type_context { int device; };

struct cuda_info {
    struct { int cc; size_t smpb; } devices[1];
};

static const cuda_info & ggml_cuda_info() {
    static const cuda_info info = { { { 610, 48 << 10 } } };
    return info;
}

static bool ggml_backend_buft_is_cuda(ggml_backend_buffer_type_t) { return false; } // recorded on the CPU

static bool turing_mma_available(int) { return false; }
static bool volta_mma_available (int) { return false; }
static bool amd_mfma_available  (int) { return false; }
static bool amd_wmma_available  (int) { return false; }

static bool ggml_cuda_flash_attn_ext_mma_f16_may_use_sparse  (int64_t, int64_t, int, int)      NOT_ASKED()
static bool ggml_cuda_flash_attn_ext_mma_f16_shall_use_sparse(int, const ggml_tensor *, int, int) NOT_ASKED()
static bool ggml_cuda_lightning_indexer_supported            (int, const ggml_tensor *)        NOT_ASKED()

enum best_fattn_kernel {
    BEST_FATTN_KERNEL_NONE,
    BEST_FATTN_KERNEL_TILE,
    BEST_FATTN_KERNEL_VEC,
    BEST_FATTN_KERNEL_MMA_F16,
};

//@ ggml-cuda/fwht.cu: ggml_cuda_op_mul_mat_use_fwht
//@ ggml-cuda/fattn.cu: ggml_cuda_fattn_kv_type_supported
//@ ggml-cuda/fattn.cu: ggml_cuda_get_best_fattn_kernel
//@ ggml-cuda/fattn.cu: ggml_cuda_flash_attn_ext_supported
//@ ggml-cuda/ggml-cuda.cu: ggml_backend_cuda_device_supports_op

extern "C" bool supports_cuda(const ggml_tensor * op) {
    static ggml_backend_cuda_device_context context = { 0 };

    ggml_backend_device device = {};
    device.context = &context;

    return ggml_backend_cuda_device_supports_op(&device, op);
}

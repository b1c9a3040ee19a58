// SYCL, without oneDNN.

#include "check.h"

#define FATTN_KQ_STRIDE      256
#define WARP_SIZE            16
#define SYCL_SOLVE_TRI_MAX_N 64
#define SYCL_SOLVE_TRI_MAX_K 64

struct ggml_backend_sycl_device_context { int device; };

enum class gpu_arch { unknown, intel_gpu_bmg_g21, intel_gpu_bmg_g31 };

struct sycl_info {
    struct { struct { gpu_arch arch; } hw_info; } devices[1];
};

static const sycl_info & ggml_sycl_info() {
    static const sycl_info info = { { { { gpu_arch::unknown } } } };
    return info;
}

static const int g_ggml_sycl_enable_flash_attention = 1;
static const int g_ggml_sycl_enable_mkl_fa          = 0;

static bool ggml_sycl_flash_attn_ext_onednn_supported(const ggml_tensor *) { return false; }

enum best_fattn_kernel {
    BEST_FATTN_KERNEL_NONE,
    BEST_FATTN_KERNEL_TILE,
    BEST_FATTN_KERNEL_VEC,
    BEST_FATTN_KERNEL_ONEDNN,
    BEST_FATTN_KERNEL_MKL,
};

//@ ggml-sycl/fattn.cpp: ggml_sycl_get_best_fattn_kernel
//@ ggml-sycl/fattn.cpp: ggml_sycl_flash_attn_ext_supported
//@ ggml-sycl/ggml-sycl.cpp: do_ggml_backend_sycl_device_supports_op

extern "C" bool supports_sycl(const ggml_tensor * op) {
    static ggml_backend_sycl_device_context context = { 0 };

    ggml_backend_device device = {};
    device.context = &context;

    return do_ggml_backend_sycl_device_supports_op(&device, op);
}

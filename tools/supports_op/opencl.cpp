// OpenCL, on a device that is no Adreno.

#include "check.h"

typedef void * cl_kernel;

enum class ADRENO_GPU_GEN { OTHER, A7X };
enum GPU_FAMILY { ADRENO, INTEL, UNKNOWN };

struct ggml_backend_opencl_context {
    ADRENO_GPU_GEN adreno_gen             = ADRENO_GPU_GEN::OTHER;
    GPU_FAMILY     gpu_family             = UNKNOWN;
    cl_kernel      kernel_argsort_f32_i32 = nullptr;

    size_t get_kernel_workgroup_size(cl_kernel) { return 256; }
};

struct ggml_backend_opencl_device_context {
    ggml_backend_opencl_context * backend_ctx;
    std::optional<std::regex>     opfilter;
};

static bool adreno_e17_compiler_quirks(const ggml_backend_opencl_context *)                  { return false; }
static bool use_adreno_kernels        (const ggml_backend_opencl_context *, const ggml_tensor *) { return false; }
static void load_cl_kernels_argsort   (ggml_backend_opencl_context *)                        {}

static bool ggml_opencl_ensure_fa_f32_f16_prefill_512(ggml_backend_opencl_context *, bool) NOT_ASKED()

//@ ggml-opencl/ggml-opencl.cpp: ggml_opencl_supports_op

extern "C" bool supports_opencl(const ggml_tensor * op) {
    static ggml_backend_opencl_context        backend;
    static ggml_backend_opencl_device_context context = { &backend, {} };

    ggml_backend_device device = {};
    device.context = &context;

    return ggml_opencl_supports_op(&device, op);
}

// Vulkan, on a device with subgroups and without cooperative matrices, as integrated graphics have them.

#include "check.h"

#include <memory>

#define UNUSED GGML_UNUSED

struct vk_device_struct {
    struct {
        struct {
            size_t maxStorageBufferRange           = 128 << 20;
            size_t maxComputeSharedMemorySize      = 32 << 10;
            size_t minStorageBufferOffsetAlignment = 64;
        } limits;
    } properties;

    size_t max_buffer_size = 1 << 30;

    bool shader_int64                   = true;
    bool buffer_device_address          = true;
    bool shader_64b_indexing            = false;
    bool coopmat2                       = false;
    bool fp16                           = true;
    bool subgroup_basic                 = true;
    bool subgroup_shuffle               = true;
    bool subgroup_vote                  = true;
    bool subgroup_arithmetic            = true;
    bool subgroup_require_full_support  = false;
    bool vulkan_memory_model            = false;

    uint32_t subgroup_size_log2     = 5;
    uint32_t max_workgroup_size_log2 = 10;

    const void * mul_mat_id_s[GGML_TYPE_COUNT] = {};
    const void * mul_mat_id_m[GGML_TYPE_COUNT] = {};
    const void * mul_mat_id_l[GGML_TYPE_COUNT] = {};

    const void * pipeline_topk_f32[11]       = {};
    const void * pipeline_topk_radix_f32     = nullptr;
    const void * pipeline_dsv4_hc_comb_f32   = nullptr;
};

typedef std::shared_ptr<vk_device_struct> vk_device;

struct ggml_backend_vk_device_context { size_t device; };

static constexpr uint32_t num_argsort_pipelines = 11;
static constexpr uint32_t num_topk_pipelines    = 11;

static vk_device ggml_vk_get_device(size_t) {
    static const vk_device device = std::make_shared<vk_device_struct>();
    return device;
}

static uint64_t vk_tensor_offset(const ggml_tensor *)                NOT_ASKED()
static bool     ggml_vk_lightning_indexer_k_type_supported(ggml_type) NOT_ASKED()

//@ ggml-vulkan/ggml-vulkan.cpp: ggml_vk_dim01_contiguous
//@ ggml-vulkan/ggml-vulkan.cpp: ggml_vk_concat_supported
//@ ggml-vulkan/ggml-vulkan.cpp: ggml_backend_vk_device_supports_op

extern "C" bool supports_vulkan(const ggml_tensor * op) {
    static ggml_backend_vk_device_context context = { 0 };

    ggml_backend_device device = {};
    device.context = &context;

    return ggml_backend_vk_device_supports_op(&device, op);
}

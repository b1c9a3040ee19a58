// Metal, on a device with SIMD groups and without bfloat16: an M1.

#include "check.h"

#include "ggml-metal/ggml-metal-common.h"
#include "ggml-metal/ggml-metal-impl.h"

typedef struct {
    struct {
        bool   has_simdgroup_mm           = true;
        bool   has_simdgroup_reduction    = true;
        bool   has_bfloat                 = false;
        size_t max_theadgroup_memory_size = 32768;
    } props;
} * ggml_metal_device_t;

//@ ggml-metal/ggml-metal-common.cpp: ggml_metal_fwht_supported_size
//@ ggml-metal/ggml-metal-common.cpp: ggml_metal_op_mul_mat_use_fwht
//@ ggml-metal/ggml-metal-common.cpp: ggml_metal_op_mul_mat_use_mm
//@ ggml-metal/ggml-metal-common.cpp: ggml_metal_op_mul_mat_id_use_mm
//@ ggml-metal/ggml-metal-device.m: ggml_metal_supports_mul_mat_op
//@ ggml-metal/ggml-metal-device.m: ggml_metal_device_supports_op

extern "C" bool supports_metal(const ggml_tensor * op) {
    static std::remove_pointer_t<ggml_metal_device_t> device;

    return ggml_metal_device_supports_op(&device, op);
}

// What is asked: an operation as text, and which back ends take it.

#include "check.h"

extern "C" {

bool supports_metal (const ggml_tensor *);
bool supports_cuda  (const ggml_tensor *);
bool supports_vulkan(const ggml_tensor *);
bool supports_sycl  (const ggml_tensor *);
bool supports_opencl(const ggml_tensor *);

static ggml_tensor as(const ggml_tensor * node, int op) {
    ggml_tensor res = *node;
    res.op = op < 0 ? node->op : (ggml_op) op;
    return res;
}

// the number of an operation, -1 if there is none of that name
int operation(const char * name) {
    for (int op = 0; op < GGML_OP_COUNT; ++op) {
        if (strcmp(ggml_op_name((ggml_op) op), name) == 0) {
            return op;
        }
    }

    return -1;
}

// one bit a back end that takes it, in the order above; op >= 0: as if it were that operation
int supported_by(const ggml_tensor * node, int op) {
    const ggml_tensor t = as(node, op);

    return supports_metal(&t) | supports_cuda(&t) << 1 | supports_vulkan(&t) << 2 | supports_sycl(&t) << 3 | supports_opencl(&t) << 4;
}

// is it computed by the device?
bool is_asked(const ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return false;
        case GGML_OP_CUSTOM:
            return ggml_nelements(node) > 1; // one value: plain C++ on the threads of the host (kvmerge-parallel.h)
        default:
            return true;
    }
}

// the operation and the types; "rows": with gaps between rows, "strided": within rows
const char * describe(const ggml_tensor * node, int op) {
    static std::string text;

    const ggml_tensor named = as(node, op);

    const auto layout = [](const ggml_tensor * t) {
        return ggml_is_contiguous(t) ? "" : ggml_is_contiguous_rows(t) ? " rows" : " strided";
    };

    text = std::string(ggml_op_desc(&named)) + ' ' + ggml_type_name(node->type) + layout(node) + " from";
    for (int i = 0; i < GGML_MAX_SRC && node->src[i]; ++i) {
        text += std::string(i > 0 ? ", " : " ") + ggml_type_name(node->src[i]->type) + layout(node->src[i]);
    }

    if (node->op == GGML_OP_FLASH_ATTN_EXT && node->src[3] && node->src[3]->ne[2] > 1) {
        text += ", mask per head";
    }

    return text.c_str();
}

}

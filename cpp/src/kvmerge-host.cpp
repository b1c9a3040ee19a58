#include "kvmerge-host.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdlib>

bool kvmerge_is_host(const ggml_tensor * tensor) {
    return ggml_backend_buffer_is_host(tensor->buffer) && !getenv("KVMERGE_AS_DEVICE");
}

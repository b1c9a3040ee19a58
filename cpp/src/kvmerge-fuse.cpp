#include "kvmerge-fuse.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdlib>

bool kvmerge_can_fuse(const ggml_tensor * tensor) {
    return ggml_backend_buffer_is_host(tensor->buffer) && !getenv("KVMERGE_PLAIN_GRAPHS");
}

#pragma once

// Tensors of our own on the device where a layer's keys are.

#include "kvmerge-engine.h"

#include <functional>
#include <utility>
#include <vector>

// One buffer for the tensors that `make` adds, of each buffer type of the layers' keys, filled with zeros.
//   make  is called with the context to add them to, and the index of the layer: two tensors a layer at most
// false: there is no memory for them.
bool kvmerge_alloc_beside_keys(
        const std::vector<kvmerge_layer> & layers,
        const std::function<void(ggml_context *, size_t)> & make,
        std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> & bufs);

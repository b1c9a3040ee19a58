#include "kvmerge-buffers.h"

#include "kvmerge-fault.h"

#include <map>

bool kvmerge_alloc_beside_keys(
        const std::vector<kvmerge_layer> & layers,
        const std::function<void(ggml_context *, size_t)> & make,
        std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> & bufs) {
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctxs;

    for (size_t l = 0; l < layers.size(); ++l) {
        auto & ctx = ctxs[ggml_backend_buffer_get_type(layers[l].k->buffer)];

        if (!ctx) {
            ctx = kvmerge_make_context(2*layers.size());
        }

        make(ctx.get(), l);
    }

    for (auto & [buft, ctx] : ctxs) {
        ggml_backend_buffer_ptr buf(kvmerge_fails() ? nullptr : ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));

        if (!buf) {
            return false;
        }

        ggml_backend_buffer_clear(buf.get(), 0);
        bufs.emplace_back(std::move(ctx), std::move(buf));
    }

    return true;
}

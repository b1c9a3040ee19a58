#pragma once

// A small ggml graph run by the context's own scheduler, so that the heavy steps run wherever the cache lies.

#include "ggml-cpp.h"

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

struct llama_context;

// A context of n_tensors tensors without data. Throws std::bad_alloc where ggml_init() would end the process.
ggml_context_ptr kvmerge_make_context(size_t n_tensors);

class kvmerge_graph {
public:
    explicit kvmerge_graph(llama_context * lctx);

    ggml_context * ctx() const { return ctx_.get(); }

    // a new input tensor whose content is copied from `data` (ggml_nbytes(tensor) bytes) when the graph runs
    ggml_tensor * input(ggml_type type, std::vector<int64_t> shape, const void * data);

    // compute t, and hand its bytes to `read` afterwards
    void output(ggml_tensor * t, std::function<void(const std::vector<uint8_t> &)> read);

    // compute t for its effect (a store into the cache)
    void store(ggml_tensor * t);

    // true when the graph is large enough to be run before more is added to it
    bool is_full() const;

    // run what was added and start anew; false: the backend failed
    bool run();

    // have the buffers that running it would take, and start anew without running it; they never become smaller
    bool reserve();

private:
    struct pending_input {
        ggml_tensor *        tensor;
        std::vector<uint8_t> data;
    };

    void reset();

    bool plan_buffers();

    void keep_on_host();

    llama_context * lctx;
    int             max_nodes;

    std::vector<uint8_t> memory; // of ctx_

    ggml_context_ptr ctx_;
    ggml_cgraph *    gf = nullptr;

    std::vector<pending_input> inputs;
    std::vector<std::pair<ggml_tensor *, std::function<void(const std::vector<uint8_t> &)>>> outputs;
};

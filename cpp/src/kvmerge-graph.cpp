#include "kvmerge-graph.h"

#include "kvmerge-fault.h"

#include "llama-context.h"

#include "ggml-backend.h"

#include <algorithm>
#include <array>

ggml_context_ptr kvmerge_make_context(size_t n_tensors) {
    const size_t size = n_tensors*ggml_tensor_overhead();

    kvmerge_may_fail();

    // what was given back a moment ago is there for ggml, which asks for a little more than the tensors
    ::operator delete(::operator new(size + 1024));

    return ggml_context_ptr(ggml_init({ /*.mem_size =*/ size, /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));
}

kvmerge_graph::kvmerge_graph(llama_context * lctx) :
    lctx(lctx),
    max_nodes(lctx->graph_max_nodes(1)),
    memory(ggml_tensor_overhead()*2*max_nodes + ggml_graph_overhead_custom(max_nodes, false)) {
    kvmerge_may_fail();

    reset();
}

void kvmerge_graph::reset() {
    ggml_init_params params = {
        /*.mem_size   =*/ memory.size(),
        /*.mem_buffer =*/ memory.data(),
        /*.no_alloc   =*/ true,
    };

    inputs.clear();
    outputs.clear();

    ctx_.reset(ggml_init(params));
    gf = ggml_new_graph_custom(ctx_.get(), max_nodes, false);
}

ggml_tensor * kvmerge_graph::input(ggml_type type, std::vector<int64_t> shape, const void * data) {
    ggml_tensor * t = ggml_new_tensor(ctx_.get(), type, shape.size(), shape.data());
    ggml_set_input(t);

    const uint8_t * bytes = static_cast<const uint8_t *>(data);
    inputs.push_back({ t, std::vector<uint8_t>(bytes, bytes + ggml_nbytes(t)) });

    return t;
}

void kvmerge_graph::output(ggml_tensor * t, std::function<void(const std::vector<uint8_t> &)> read) {
    ggml_set_output(t);
    ggml_build_forward_expand(gf, t);

    outputs.emplace_back(t, std::move(read));
}

void kvmerge_graph::store(ggml_tensor * t) {
    ggml_build_forward_expand(gf, t);
}

bool kvmerge_graph::is_full() const {
    return ggml_graph_n_nodes(gf) + (int) inputs.size() > max_nodes/4;
}

// Allocating alone keeps the plan of the graph before when the number of nodes is the same, with whatever that one could do
// in place. A plan changes the graph that it is made for: a backend may put the nodes into another order, and where an input
// lies on another device, a node reads a copy that the scheduler forgets with the plan. So all of it is put back.
bool kvmerge_graph::plan_buffers() {
    ggml_tensor ** nodes   = ggml_graph_nodes(gf);
    const int      n_nodes = ggml_graph_n_nodes(gf);

    std::vector<std::pair<ggml_tensor *, std::array<ggml_tensor *, GGML_MAX_SRC>>> before(n_nodes);
    for (int i = 0; i < n_nodes; ++i) {
        before[i].first = nodes[i];
        std::copy_n(nodes[i]->src, GGML_MAX_SRC, before[i].second.begin());
    }

    keep_on_host();

    const bool ok = !kvmerge_fails() && ggml_backend_sched_reserve(lctx->get_sched(), gf);

    for (int i = 0; i < n_nodes; ++i) {
        nodes[i] = before[i].first;
        std::copy_n(before[i].second.begin(), GGML_MAX_SRC, nodes[i]->src);
    }

    keep_on_host();

    return ok;
}

// A device of another machine says that it takes every operation, and would call a function of ours by its address there.
void kvmerge_graph::keep_on_host() {
    ggml_backend_sched_t sched = lctx->get_sched();
    ggml_backend_t       cpu   = ggml_backend_sched_get_backend(sched, ggml_backend_sched_get_n_backends(sched) - 1);

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_tensor * node = ggml_graph_node(gf, i);

        if (node->op == GGML_OP_CUSTOM) {
            ggml_backend_sched_set_tensor_backend(sched, node, cpu);
        }
    }
}

bool kvmerge_graph::run() {
    bool ok = true;

    if (ggml_graph_n_nodes(gf) > 0) {
        ggml_backend_sched_t sched = lctx->get_sched();

        ggml_backend_sched_reset(sched);

        ok = plan_buffers() && ggml_backend_sched_alloc_graph(sched, gf);

        if (ok) {
            for (const auto & inp : inputs) {
                // an input that no node reads is not allocated
                if (inp.tensor->buffer) {
                    ggml_backend_tensor_set(inp.tensor, inp.data.data(), 0, inp.data.size());
                }
            }

            ok = !kvmerge_fails() && lctx->graph_compute(gf, true) == GGML_STATUS_SUCCESS;
        }

        if (ok) {
            ggml_backend_sched_synchronize(sched);

            std::vector<uint8_t> bytes;
            for (const auto & [t, read] : outputs) {
                bytes.resize(ggml_nbytes(t));
                ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
                read(bytes);
            }
        }

        ggml_backend_sched_reset(sched);
    }

    reset();

    return ok;
}

bool kvmerge_graph::reserve() {
    ggml_backend_sched_t sched = lctx->get_sched();

    ggml_backend_sched_reset(sched);

    const bool ok = plan_buffers();

    ggml_backend_sched_reset(sched);

    reset();

    return ok;
}

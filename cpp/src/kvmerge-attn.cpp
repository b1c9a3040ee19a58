#include "kvmerge-attn.h"

#include "kvmerge-accumulate.h"
#include "kvmerge-engine.h"

#include "llama-batch.h"
#include "llama-kv-cache.h"

#include <algorithm>

// above this many tokens a mask per head would need too large a compute buffer (n_kv*n_tokens*n_head)
static constexpr int64_t N_TOKENS_MASK_PER_HEAD = 16;

// which query rows of the ubatch go where
class kvmerge_graph_input : public llm_graph_input_i {
public:
    explicit kvmerge_graph_input(std::shared_ptr<const kvmerge_engine> engine) : engine(std::move(engine)), version(this->engine->version) {}

    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);

        const auto & observer = engine->observer;

        ggml_backend_tensor_set(src, observer.sources().data(),      0, ggml_nbytes(src));
        ggml_backend_tensor_set(dst, observer.destinations().data(), 0, ggml_nbytes(dst));
    }

    bool can_reuse(const llm_graph_params & params) override {
        return version == engine->version && src->ne[0] == engine->observer.n_copies(params.ubatch.n_tokens);
    }

    ggml_tensor * src = nullptr; // I32 [n_copies]
    ggml_tensor * dst = nullptr; // I64 [n_copies]

    // shared: the graph may outlive the cache's engine
    const std::shared_ptr<const kvmerge_engine> engine;

private:
    const int version;
};

// one input serves all layers of a graph
static kvmerge_graph_input * get_input(const llm_graph_context & graph, const kvmerge_engine * engine) {
    for (const auto & input : graph.res->inputs) {
        auto * inp = dynamic_cast<kvmerge_graph_input *>(input.get());
        if (inp && inp->engine.get() == engine) {
            return inp;
        }
    }

    auto inp = std::make_unique<kvmerge_graph_input>(engine->shared_from_this());

    const int64_t n_copies = engine->observer.n_copies(graph.n_tokens);

    inp->src = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I32, n_copies);
    inp->dst = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I64, n_copies);

    ggml_set_input(inp->src);
    ggml_set_input(inp->dst);

    return static_cast<kvmerge_graph_input *>(graph.res->add_input(std::move(inp)));
}

static void build_observe(const llm_graph_context & graph, const kvmerge_engine * engine, const kvmerge_layer & layer, ggml_tensor * q) {
    ggml_context * ctx = graph.ctx0;

    const auto * inp = get_input(graph, engine);

    if (!ggml_is_contiguous(q)) {
        q = ggml_cont(ctx, q);
    }

    ggml_tensor * rows = ggml_reshape_2d(ctx, q, layer.q->ne[0], graph.n_tokens);        // [n_embd_head_k*n_head, n_tokens]
    rows = ggml_get_rows(ctx, rows, inp->src);                                           // [n_embd_head_k*n_head, n_copies]

    ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx, layer.q, rows, inp->dst));
}

ggml_tensor * kvmerge_last(ggml_context * ctx, ggml_tensor * t, int dim, int64_t n) {
    if (t->ne[dim] == n) {
        return t;
    }

    int64_t ne[GGML_MAX_DIMS];
    std::copy_n(t->ne, GGML_MAX_DIMS, ne);
    ne[dim] = n;

    return ggml_view_4d(ctx, t, ne[0], ne[1], ne[2], ne[3], t->nb[1], t->nb[2], t->nb[3], (t->ne[dim] - n)*t->nb[dim]);
}

ggml_tensor * kvmerge_build_mask_per_head(ggml_context * ctx, const kvmerge_layer & layer, ggml_tensor * kq_mask) {
    const int64_t n_kv    = kq_mask->ne[0];
    const int64_t n_group = layer.n_head/layer.n_head_kv;

    ggml_tensor * bias = ggml_view_4d(ctx, layer.bias, n_kv, 1, 1, layer.n_head_kv, layer.bias->nb[1], layer.bias->nb[1], layer.bias->nb[1], 0);
    bias = ggml_repeat_4d (ctx, bias, n_kv, 1, n_group, layer.n_head_kv);
    bias = ggml_reshape_3d(ctx, bias, n_kv, 1, layer.n_head);                            // [n_kv, 1, n_head]

    ggml_tensor * mask = ggml_repeat_4d(ctx, kq_mask, n_kv, kq_mask->ne[1], layer.n_head, 1);

    return ggml_add(ctx, mask, bias);
}

ggml_tensor * kvmerge_build_attn(
        const llm_graph_context & graph,
               kvmerge_engine   * engine,
                  ggml_tensor   * q,
                  ggml_tensor   * k,
                  ggml_tensor   * v,
                  ggml_tensor   * kq_b,
                  ggml_tensor   * kq_mask,
                  ggml_tensor   * sinks,
                  ggml_tensor   * v_mla,
                        float     kq_scale,
                          int     il) {
    kvmerge_layer * layer = nullptr;

    if (engine) {
        for (auto & cur : engine->layers) {
            if (cur.il == il) {
                layer = &cur;
            }
        }
    }

    // layers that attend to the cache of another layer share its bias, but are not observed
    const bool is_shared = engine && !layer;
    if (is_shared) {
        layer = engine->find_layer(k);
    }

    if (!layer) {
        return graph.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, v_mla, 0, kq_scale, il);
    }

    ggml_context * ctx = graph.ctx0;

    if (k->ne[2] < kq_mask->ne[0]) {
        kq_mask = ggml_cont(ctx, kvmerge_last(ctx, kq_mask, 0, k->ne[2]));
    }

    if (!is_shared) {
        layer->kq_scale = kq_scale;
        layer->sinks    = sinks;

        if (engine->is_attached) {
            build_observe(graph, engine, *layer, q);

            if (layer->sum) {
                kvmerge_build_accumulate(graph, *engine, *layer, q, k, kq_mask, kq_scale);
            }
        }
    }

    if (!engine->has_bias) {
        return graph.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, v_mla, 0, kq_scale, il);
    }

    if (layer->n_head_kv == 1 || !engine->is_per_head) {
        kq_mask = ggml_add(ctx, kq_mask, ggml_view_2d(ctx, layer->bias, kq_mask->ne[0], 1, layer->bias->nb[1], 0));

        return graph.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, v_mla, 0, kq_scale, il);
    }

    if (layer->mask_per_head && graph.n_tokens <= N_TOKENS_MASK_PER_HEAD) {
        kq_mask = kvmerge_build_mask_per_head(graph.ctx0, *layer, kq_mask);

        return graph.build_attn_mha(q, k, v, kq_b, kq_mask, sinks, v_mla, 0, kq_scale, il);
    }

    // one KV head at a time, each with a mask of its own
    const int64_t n_head_kv = layer->n_head_kv;
    const int64_t n_group   = q->ne[1]/n_head_kv;

    ggml_tensor * res = nullptr;

    for (int64_t h = 0; h < n_head_kv; ++h) {
        ggml_tensor * q_h = ggml_view_3d(ctx, q, q->ne[0], n_group, q->ne[2], q->nb[1], q->nb[2], h*n_group*q->nb[1]);
        ggml_tensor * k_h = ggml_view_4d(ctx, k, k->ne[0], 1, k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], h*k->nb[1]);
        ggml_tensor * v_h = ggml_view_4d(ctx, v, v->ne[0], 1, v->ne[2], v->ne[3], v->nb[1], v->nb[2], v->nb[3], h*v->nb[1]);

        ggml_tensor * bias_h  = ggml_view_2d(ctx, layer->bias, kq_mask->ne[0], 1, layer->bias->nb[1], h*layer->bias->nb[1]);
        ggml_tensor * sinks_h = sinks ? ggml_view_1d(ctx, sinks, n_group, h*n_group*sinks->nb[0]) : nullptr;
        ggml_tensor * mask_h  = ggml_add(ctx, kq_mask, bias_h);                          // [n_kv, n_tokens]

        ggml_tensor * cur = graph.build_attn_mha(q_h, k_h, v_h, kq_b, mask_h, sinks_h, v_mla, 0, kq_scale, il);

        res = res ? ggml_concat(ctx, res, cur, 0) : cur;
    }

    return res;                                                                          // [n_embd_head_v*n_head, n_tokens]
}

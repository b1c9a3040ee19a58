// The engine of a context: what it can be attached to, and what it takes.

#include "kvmerge-buffers.h"
#include "kvmerge-engine.h"
#include "kvmerge-error.h"
#include "kvmerge-params.h"

#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <limits>

// the part of a context's memory that grows with every token and can be merged
static kvmerge_cache * find_cache(llama_memory_i * memory) {
    if (auto * cur = dynamic_cast<kvmerge_cache *>(memory)) {
        return cur;
    }
    if (auto * cur = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return dynamic_cast<kvmerge_cache *>(cur->get_base());
    }
    if (dynamic_cast<llama_memory_hybrid_idx *>(memory)) {
        return nullptr; // an index beside the keys, of cells that would no longer be the same, chooses what is attended to
    }
    if (auto * cur = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return dynamic_cast<kvmerge_cache *>(cur->get_mem_attn());
    }
    if (auto * cur = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return dynamic_cast<kvmerge_cache *>(cur->get_mem_attn()->get_base());
    }

    return nullptr;
}

static kvmerge_engine * find_engine(llama_memory_i * memory) {
    const kvmerge_cache * cache = find_cache(memory);

    return cache ? cache->get_merge() : nullptr;
}

uint32_t kvmerge_n_nodes(llama_memory_i * memory, uint32_t n_tokens) {
    const auto * engine = find_engine(memory);

    return engine ? engine->n_nodes(n_tokens) : 0;
}

bool kvmerge_may_remove(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const auto * engine = find_engine(memory);

    return !engine || engine->may_remove(seq_id, std::max(p0, 0), p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1);
}

kvmerge_engine::kvmerge_engine(kvmerge_cache & cache, llama_context * lctx, const kvmerge_params & params, int32_t n_seq_max) :
    cache(cache), lctx(lctx), params(params), observer(params.n_window, params.n_flow_rows, n_seq_max),
    v_trans(cache.v_trans), tokens(cache.get_size()), is_merged(cache.get_size()), sequences(n_seq_max),
    is_idle(n_seq_max), was_cleared(n_seq_max) {
    if (cache.hparams.attn_soft_cap) {
        logit_softcap = cache.hparams.f_attn_logit_softcapping;
    }
}

kvmerge_status kvmerge_engine::attach(llama_context * lctx, const kvmerge_params & params, kvmerge_engine ** out) {
    if (const auto status = kvmerge_check_params(params)) {
        return status;
    }

    kvmerge_cache * cache = find_cache(lctx->get_memory());

    if (!cache) {
        return kvmerge_error(KVMERGE_ERROR_UNSUPPORTED,
                "this model's memory is not a KV cache with keys and values (recurrent, MLA, sparse or encoder-only models cannot be merged)");
    }
    if (cache->engine && cache->engine->is_attached) {
        return kvmerge_error(KVMERGE_ERROR_STATE, "an engine is attached to this context already");
    }
    if (cache->layers.empty()) {
        return kvmerge_error(KVMERGE_ERROR_UNSUPPORTED, "all layers with a cache see a sliding window only: their cache does not grow, and there is nothing to merge");
    }
    if (cache->get_n_stream() > 1) {
        return kvmerge_error(KVMERGE_ERROR_UNSUPPORTED, "%u sequences with a cache each: use a unified cache (kv_unified) or one sequence", cache->get_n_stream());
    }
    if (cache->other) {
        return kvmerge_error(KVMERGE_ERROR_UNSUPPORTED, "this context shares the cache of another one");
    }
    if (cache->hparams.use_alibi) {
        return kvmerge_error(KVMERGE_ERROR_UNSUPPORTED, "the model uses ALiBi, whose attention depends on where a token is stored");
    }
    if (cache->get_cells(0).get_used() > 0) {
        return kvmerge_error(KVMERGE_ERROR_STATE, "the cache holds tokens already: attach before the prompt is read, or clear the cache");
    }

    try {
        // one that was detached may have left layers without their first cells
        if (cache->engine && !cache->engine->store_all()) {
            return kvmerge_error(KVMERGE_ERROR_MEMORY, "not enough memory for the cells of all layers");
        }

        std::shared_ptr<kvmerge_engine> engine(new kvmerge_engine(*cache, lctx, params, cache->get_n_seq_max()));

        if (const auto status = engine->init_layers()) {
            return status;
        }

        if (cache->engine) {
            // of one that was detached: K and V stay where they are
            engine->has_own_bufs = cache->engine->has_own_bufs;
            engine->pages        = std::move(cache->engine->pages);
        }

        cache->engine = engine;
    } catch (const std::bad_alloc &) {
        return kvmerge_error(KVMERGE_ERROR_MEMORY, "not enough memory for the engine");
    }

    *out = cache->engine.get();

    // the graphs are larger with an engine: the context makes room at the next decode
    lctx->sched_reserve_later();

    return KVMERGE_OK;
}

void kvmerge_engine::detach() {
    is_attached = false;
    version++;
}

kvmerge_status kvmerge_engine::set_params(const kvmerge_params & params_new) {
    if (const auto status = kvmerge_check_params(params_new)) {
        return status;
    }
    if (params_new.n_window != params.n_window || params_new.n_flow_rows != params.n_flow_rows) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_window (%d) and n_flow_rows (%d) cannot change after attaching", params.n_window, params.n_flow_rows);
    }
    if (params_new.score == KVMERGE_SCORE_ALL && !layers[0].sum) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "a score over all queries has to be chosen when attaching: what was not added up cannot be had later");
    }

    params = params_new;

    return KVMERGE_OK;
}

kvmerge_status kvmerge_engine::lay_out(bool merged) {
    if (!lctx->get_model().hparams.no_alloc) {
        return kvmerge_error(KVMERGE_ERROR_STATE, "the model was loaded to be used: only one that was loaded without memory (no_alloc) is laid out");
    }

    has_bias    = merged;
    is_per_head = merged;
    version++;

    lctx->sched_reserve_later();
    lctx->sched_reserve();

    return KVMERGE_OK;
}

// does the backend make a mask per head, and does its attention take it?
static bool supports_mask_per_head(ggml_backend_dev_t dev, const kvmerge_layer & layer, bool flash_attn) {
    ggml_init_params params = {
        /*.mem_size   =*/ 8*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr ctx_ptr { ggml_init(params) };
    ggml_context   * ctx = ctx_ptr.get();

    const int64_t n_kv = 256;

    ggml_tensor * mask = ggml_new_tensor_2d(ctx, flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n_kv, 1);
    mask = ggml_repeat_4d(ctx, mask, n_kv, 1, layer.n_head, 1);

    ggml_tensor * res;

    if (flash_attn) {
        ggml_tensor * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32,  layer.n_embd_head_k, 1,    layer.n_head);
        ggml_tensor * k = ggml_new_tensor_3d(ctx, layer.k->type,  layer.n_embd_head_k, n_kv, layer.n_head_kv);
        ggml_tensor * v = ggml_new_tensor_3d(ctx, layer.v->type,  layer.n_embd_head_v, n_kv, layer.n_head_kv);

        res = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, 0.0f, 0.0f);
    } else {
        ggml_tensor * kq = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_kv, 1, layer.n_head);

        res = ggml_soft_max_ext(ctx, kq, mask, 1.0f, 0.0f);
    }

    return ggml_backend_dev_supports_op(dev, mask) && ggml_backend_dev_supports_op(dev, res);
}

kvmerge_status kvmerge_engine::init_layers() {
    const auto & hparams    = cache.hparams;
    const bool   flash_attn = lctx->get_cparams().flash_attn;

    for (const auto & kv : cache.layers) {
        if (!kv.k || !kv.v) {
            return kvmerge_error(KVMERGE_ERROR_UNSUPPORTED, "layer %u keeps no values of its own (multi-head latent attention cannot be merged)", kv.il);
        }

        kvmerge_layer layer = {};

        layer.il            = kv.il;
        layer.n_head        = hparams.n_head(kv.il);
        layer.n_head_kv     = hparams.n_head_kv(kv.il);
        layer.n_embd_head_k = hparams.n_embd_head_k(kv.il);
        layer.n_embd_head_v = hparams.n_embd_head_v(kv.il);
        layer.k             = kv.k;
        layer.v             = kv.v;
        layer.kq_scale      = 1.0f/sqrtf(float(layer.n_embd_head_k));

        if (layer.n_embd_head_k % ggml_blck_size(layer.k->type) != 0 || layer.n_embd_head_v % ggml_blck_size(layer.v->type) != 0) {
            return kvmerge_error(KVMERGE_ERROR_UNSUPPORTED,
                    "layer %u: head size %d/%d does not divide into the blocks of cache types %s/%s: use f16",
                    kv.il, layer.n_embd_head_k, layer.n_embd_head_v, ggml_type_name(layer.k->type), ggml_type_name(layer.v->type));
        }

        ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(kv.k->buffer));

        layer.mask_per_head = !dev || supports_mask_per_head(dev, layer, flash_attn);

        layers.push_back(layer);
    }

    const auto make_q = [&](ggml_context * ctx, size_t l) {
        auto & layer = layers[l];

        layer.q = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, (int64_t) layer.n_embd_head_k*layer.n_head, observer.n_slots());
        ggml_format_name(layer.q, "kvmerge_q_l%d", layer.il);
    };

    biases bias;

    if (!kvmerge_alloc_beside_keys(layers, make_q, bufs_q) || !make_bias(cache.get_size(), std::vector<uint32_t>(layers.size()), bias)) {
        return kvmerge_error(KVMERGE_ERROR_MEMORY, "failed to allocate the buffers of the observed queries and of the bias");
    }

    use_bias(std::move(bias));

    flows.resize(layers.size());
    merged.resize(layers.size());
    for (size_t l = 0; l < layers.size(); ++l) {
        merged[l].resize(layers[l].n_head_kv);
    }

    room.is_elastic = cache.get_size() < lctx->get_cparams().n_ctx_seq;

    stats.error          = -1;
    stats.n_layers       = layers.size();
    stats.n_heads        = n_head_kv_max();
    for (const auto & layer : layers) {
        stats.bytes_per_cell += bytes_per_cell(layer);
    }

    return KVMERGE_OK;
}

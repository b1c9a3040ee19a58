#include "kvmerge-engine.h"

#include "kvmerge-accumulate.h"
#include "kvmerge-allocate.h"
#include "kvmerge-attn.h"
#include "kvmerge-error.h"
#include "kvmerge-fault.h"
#include "kvmerge-fold.h"
#include "kvmerge-match.h"
#include "kvmerge-mosaic.h"
#include "kvmerge-parallel.h"
#include "kvmerge-pool.h"
#include "kvmerge-room.h"
#include "kvmerge-runs.h"
#include "kvmerge-score.h"
#include "kvmerge-select.h"
#include "kvmerge-weigh.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-idx.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <utility>

//
// attach and detach
//

// the part of a context's memory that grows with every token and can be merged
static llama_kv_cache * find_cache(llama_memory_i * memory) {
    if (auto * cur = dynamic_cast<llama_kv_cache *>(memory)) {
        return cur;
    }
    if (auto * cur = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        return cur->get_base();
    }
    if (dynamic_cast<llama_memory_hybrid_idx *>(memory)) {
        return nullptr; // an index beside the keys, of cells that would no longer be the same, chooses what is attended to
    }
    if (auto * cur = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return cur->get_mem_attn();
    }
    if (auto * cur = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return cur->get_mem_attn()->get_base();
    }

    return nullptr;
}

static kvmerge_engine * find_engine(llama_memory_i * memory) {
    const llama_kv_cache * cache = find_cache(memory);

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

static kvmerge_status check_params(const kvmerge_params & params) {
    if (params.size != sizeof(kvmerge_params)) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT,
                "params.size is %u, this library's kvmerge_params has %zu bytes: header and library are of different versions",
                params.size, sizeof(kvmerge_params));
    }

    const struct {
        const char * name;
        double value, min, max;
    } ranges[] = {
        { "score",       (double) params.score,       KVMERGE_SCORE_PROXY,      KVMERGE_SCORE_ALL        },
        { "allocate",    (double) params.allocate,    KVMERGE_ALLOCATE_UNIFORM, KVMERGE_ALLOCATE_EARLY   },
        { "select",      (double) params.select,      KVMERGE_SELECT_TOP,       KVMERGE_SELECT_MEDIA     },
        { "match",       (double) params.match,       KVMERGE_MATCH_NONE,       KVMERGE_MATCH_SEGMENT    },
        { "fold",        (double) params.fold,        KVMERGE_FOLD_MEAN,        KVMERGE_FOLD_GAUSSIAN    },
        { "bias",        (double) params.bias,        KVMERGE_BIAS_NONE,        KVMERGE_BIAS_FIT         },
        { "n_window",    (double) params.n_window,    1,                        256                      },
        { "n_keep",      (double) params.n_keep,      0,                        256                      },
        { "n_sink",      (double) params.n_sink,      0,                        256                      },
        { "n_flow_rows", (double) params.n_flow_rows, 1,                        65536                    },
        { "n_pool",      (double) params.n_pool,      1,                        63                       },
        { "n_floor",     (double) params.n_floor,     0,                        1024                     },
        { "n_member",    (double) params.n_member,    0,                        65536                    },
        { "theta",       params.theta,                0,                        1                        },
        { "tau",         params.tau,                  0,                        1                        },
        { "recent",      params.recent,               0,                        1                        },
        { "cover",       params.cover,                0,                        1                        },
        { "similarity",  params.similarity,           -1,                       1                        },
        { "pivots",      params.pivots,               0,                        1                        },
        { "text",        params.text,                 0,                        1                        },
        { "text_pivots", params.text_pivots,          0,                        1                        },
    };

    for (const auto & range : ranges) {
        if (!(range.value >= range.min && range.value <= range.max)) { // also catches NaN
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "%s is %g, accepted is %g to %g", range.name, range.value, range.min, range.max);
        }
    }

    return KVMERGE_OK;
}

kvmerge_engine::kvmerge_engine(llama_kv_cache & cache, llama_context * lctx, const kvmerge_params & params, int32_t n_seq_max) :
    cache(cache), lctx(lctx), params(params), observer(params.n_window, params.n_flow_rows, n_seq_max),
    v_trans(cache.v_trans), tokens(cache.get_size()), is_merged(cache.get_size()), sequences(n_seq_max) {
    if (cache.hparams.attn_soft_cap) {
        logit_softcap = cache.hparams.f_attn_logit_softcapping;
    }
}

kvmerge_status kvmerge_engine::attach(llama_context * lctx, const kvmerge_params & params, kvmerge_engine ** out) {
    if (const auto status = check_params(params)) {
        return status;
    }

    llama_kv_cache * cache = find_cache(lctx->get_memory());

    if (!cache) {
        return kvmerge_error(KVMERGE_ERROR_UNSUPPORTED,
                "this model's memory is not a KV cache with keys and values (recurrent, MLA, sparse or encoder-only models cannot be merged)");
    }
    if (cache->merge && cache->merge->is_attached) {
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
        if (cache->merge && !cache->merge->store_all()) {
            return kvmerge_error(KVMERGE_ERROR_MEMORY, "not enough memory for the cells of all layers");
        }

        std::shared_ptr<kvmerge_engine> engine(new kvmerge_engine(*cache, lctx, params, cache->get_n_seq_max()));

        if (const auto status = engine->init_layers()) {
            return status;
        }

        if (cache->merge) {
            // of one that was detached: K and V stay where they are
            engine->has_own_bufs = cache->merge->has_own_bufs;
            engine->pages        = std::move(cache->merge->pages);
        }

        cache->merge = engine;
    } catch (const std::bad_alloc &) {
        return kvmerge_error(KVMERGE_ERROR_MEMORY, "not enough memory for the engine");
    }

    *out = cache->merge.get();

    // the graphs are larger with an engine: the context makes room at the next decode
    lctx->sched_reserve_later();

    return KVMERGE_OK;
}

void kvmerge_engine::detach() {
    is_attached = false;
    version++;
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

// one buffer for the tensors that `make` adds, of each buffer type of the layers' keys
static bool alloc_beside_keys(
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

    if (!alloc_beside_keys(layers, make_q, bufs_q) || !make_bias(cache.get_size(), std::vector<uint32_t>(layers.size()), bias)) {
        return kvmerge_error(KVMERGE_ERROR_MEMORY, "failed to allocate the buffers of the observed queries and of the bias");
    }

    use_bias(std::move(bias));

    flows.resize(layers.size());
    merged.resize(layers.size());
    for (size_t l = 0; l < layers.size(); ++l) {
        merged[l].resize(layers[l].n_head_kv);
    }

    room.is_elastic = cache.get_size() < lctx->get_cparams().n_ctx_seq;

    stats.n_layers       = layers.size();
    stats.n_heads        = n_head_kv_max();
    for (const auto & layer : layers) {
        stats.bytes_per_cell += bytes_per_cell(layer);
    }

    return KVMERGE_OK;
}

bool kvmerge_engine::make_bias(uint32_t n_cells, const std::vector<uint32_t> & first, biases & out) const {
    const bool flash_attn = lctx->get_cparams().flash_attn;

    out.bias.resize(layers.size());
    out.sum .resize(layers.size());

    const auto make = [&](ggml_context * ctx, size_t l) {
        const auto & layer = layers[l];

        const int64_t n_rows = n_cells - first[l];

        out.bias[l] = ggml_new_tensor_2d(ctx, flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n_rows, layer.n_head_kv);
        ggml_format_name(out.bias[l], "kvmerge_bias_l%d", layer.il);

        if (params.score == KVMERGE_SCORE_ALL || layer.sum) {
            out.sum[l] = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_rows, layer.n_head_kv);
            ggml_format_name(out.sum[l], "kvmerge_sum_l%d", layer.il);
        }
    };

    if (!alloc_beside_keys(layers, make, out.bufs)) {
        return false;
    }

    for (size_t l = 0; l < layers.size(); ++l) {
        if (has_bias) {
            upload_bias(l, out.bias[l], first[l]);
        }
        if (const auto * sum = layers[l].sum) {
            std::vector<float> values(ggml_nelements(sum));
            ggml_backend_tensor_get(sum, values.data(), 0, ggml_nbytes(sum));

            const uint32_t i_first = std::max(layers[l].first, first[l]);
            const uint32_t i_last  = std::min<uint32_t>(layers[l].first + sum->ne[0], n_cells);

            for (int32_t h = 0; h < layers[l].n_head_kv && i_first < i_last; ++h) {
                ggml_backend_tensor_set(out.sum[l], values.data() + h*sum->ne[0] + i_first - layers[l].first,
                        h*out.sum[l]->nb[1] + (i_first - first[l])*sizeof(float), (i_last - i_first)*sizeof(float));
            }
        }
    }

    return true;
}

void kvmerge_engine::use_bias(biases && next) {
    for (size_t l = 0; l < layers.size(); ++l) {
        layers[l].bias = next.bias[l];
        layers[l].sum  = next.sum [l];
    }

    bufs_bias = std::move(next.bufs);
}

void kvmerge_engine::keep_plans(bool keep) {
    keeps_plans = keep;

    if (!keep) {
        plans.clear();
        plans.shrink_to_fit();
    }
}

bool kvmerge_engine::measures_flow() const {
    return keeps_plans || params.match == KVMERGE_MATCH_FLOW ||
        params.allocate == KVMERGE_ALLOCATE_ENTROPY;
}

kvmerge_status kvmerge_engine::set_params(const kvmerge_params & params_new) {
    if (const auto status = check_params(params_new)) {
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

//
// observe
//

kvmerge_status kvmerge_engine::media_begin(int32_t modality) {
    if (modality != KVMERGE_IMAGE && modality != KVMERGE_AUDIO) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "modality is %d, accepted are KVMERGE_IMAGE (%d) and KVMERGE_AUDIO (%d)", modality, KVMERGE_IMAGE, KVMERGE_AUDIO);
    }
    if (media.is_open) {
        return kvmerge_error(KVMERGE_ERROR_STATE, "the medium before was not ended");
    }

    media.is_open  = true;
    media.is_new   = true;
    media.modality = modality;
    media.weights.clear();

    return KVMERGE_OK;
}

kvmerge_status kvmerge_engine::media_weights(const float * weights, int32_t n) {
    if (!media.is_open) {
        return kvmerge_error(KVMERGE_ERROR_STATE, "no medium was begun");
    }

    bool is_one = true;
    for (int32_t i = 0; i < n; ++i) {
        if (!(weights[i] >= 1.0f && weights[i] <= 65536.0f)) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "weights[%d] is %g, accepted are 1 to 65536", i, weights[i]);
        }
        is_one = is_one && weights[i] == 1.0f;
    }

    media.weights.assign(weights, weights + n);
    std::reverse(media.weights.begin(), media.weights.end());

    if (!is_one && !has_bias) {
        has_bias = true;
        version++;
        for (size_t l = 0; l < layers.size(); ++l) {
            upload_bias(l);
        }
        lctx->sched_reserve_later();
    }

    return KVMERGE_OK;
}

kvmerge_status kvmerge_engine::media_end() {
    if (!media.is_open) {
        return kvmerge_error(KVMERGE_ERROR_STATE, "no medium was begun");
    }

    media.is_open = false;
    media.weights.clear();

    return KVMERGE_OK;
}

void kvmerge_engine::on_ubatch(const std::vector<uint32_t> & cells, const llama_ubatch & ubatch) {
    // the buffers of graphs that were reserved anew left gaps where those before them were
    if (gives_back) {
        gives_back = false;
        kvmerge_give_back();
    }

    std::vector<int32_t> seq  (ubatch.n_tokens);
    std::vector<int32_t> order(ubatch.n_tokens);
    std::vector<uint8_t> modality(ubatch.n_tokens);

    bool bias_changes = std::exchange(bias_is_stale, false);

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        auto & s = sequences[ubatch.seq_id[i][0]];

        const uint8_t m = media.is_open ? media.modality : (uint8_t) (ubatch.token ? KVMERGE_TEXT : KVMERGE_IMAGE);

        if (s.segment < 0 || m != s.modality || (media.is_open && media.is_new)) {
            s.segment++;
        }
        media.is_new = false;
        s.modality   = m;

        seq  [i]    = ubatch.seq_id[i][0];
        order[i]    = s.n_seen++;
        modality[i] = m;

        bias_changes = wipe(cells[i]) || bias_changes;

        auto & token = tokens[cells[i]];

        token.order    = order[i];
        token.segment  = s.segment;
        token.modality = m;

        if (media.is_open && !media.weights.empty()) {
            token.mass = media.weights.back();
            token.bias = std::log(token.mass);
            media.weights.pop_back();

            bias_changes = bias_changes || token.bias != 0.0f;
        }

        // the token may belong to more sequences
        for (int32_t j = 1; j < ubatch.n_seq_id[i]; ++j) {
            sequences[ubatch.seq_id[i][j]].n_seen = s.n_seen;
        }
    }

    observer.choose(seq, order, modality);

    if (bias_changes) {
        for (size_t l = 0; l < layers.size(); ++l) {
            upload_bias(l);
        }
    }
}

bool kvmerge_engine::wipe(uint32_t idx) {
    if (tokens[idx].order < 0) {
        return false;
    }

    bool had_bias = tokens[idx].bias != 0.0f;
    for (size_t l = 0; is_merged[idx] && l < layers.size(); ++l) {
        for (const auto & head : merged[l]) {
            had_bias = had_bias || head[idx].bias != 0.0f;
        }
    }

    tokens[idx]    = {};
    is_merged[idx] = 0;

    clear_sum(idx);

    return had_bias;
}

//
// changes of the cache
//

void kvmerge_engine::on_clear() {
    for (size_t s = 0; s < sequences.size(); ++s) {
        forget(s);
    }

    std::fill(tokens.begin(),    tokens.end(),    kvmerge_cell {});
    std::fill(is_merged.begin(), is_merged.end(), 0);

    for (auto * bufs : { &bufs_q, &bufs_bias }) {
        for (auto & [ctx, buf] : *bufs) {
            ggml_backend_buffer_clear(buf.get(), 0);
        }
    }
    if (has_bias) {
        has_bias    = false;
        is_per_head = false;
        version++;
    }

    media.is_open = false;
    media.weights.clear();
    is_refusing   = false;
    pending       = {};
    n_wanted      = 0;
    is_restored   = false;

    shrink();
}

// all that the sequence holds
static bool is_whole(const llama_kv_cells & cells, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    return p0 <= cells.seq_pos_min(seq_id) && p1 > cells.seq_pos_max(seq_id);
}

bool kvmerge_engine::may_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto & cells = cache.get_cells(0);

    const int32_t first = seq_id < 0 ? 0                : seq_id;
    const int32_t last  = seq_id < 0 ? sequences.size() : seq_id + 1;

    for (int32_t s = first; s < last; ++s) {
        const llama_pos end = sequences[s].pos_merged;

        if (cells.seq_pos_min(s) < 0 || end == 0 || is_whole(cells, s, p0, p1)) {
            continue;
        }

        if (p0 < end) {
            return false;
        }

        // what is read next has to follow on a cell, and the last of the merged tokens may have none of its own
        const auto & seq_pos = cells.seq_pos_get(s);
        const auto   before  = seq_pos.lower_bound({ p0 - 1, 0 });

        if (p0 == end && before != seq_pos.end() && before->first != p0 - 1) {
            return false;
        }
    }

    return true;
}

bool kvmerge_engine::on_seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (!may_remove(seq_id, p0, p1)) {
        return false;
    }

    const auto & cells = cache.get_cells(0);

    const int32_t first = seq_id < 0 ? 0                : seq_id;
    const int32_t last  = seq_id < 0 ? sequences.size() : seq_id + 1;

    for (int32_t s = first; s < last; ++s) {
        if (cells.seq_pos_min(s) < 0) {
            continue;
        }

        if (is_whole(cells, s, p0, p1)) {
            forget(s);
        } else if (p1 > cells.seq_pos_max(s)) {
            // the tail goes
            int32_t n_seen = sequences[s].n_seen;
            int64_t removed[kvmerge_observer::n_modalities] = {};

            const auto & seq_pos = cells.seq_pos_get(s);

            for (auto it = seq_pos.lower_bound({ p0, 0 }); it != seq_pos.end(); ++it) {
                const auto & token = tokens[it->second];

                n_seen = std::min(n_seen, token.order);
                removed[token.modality]++;
            }

            if (n_seen < sequences[s].n_seen) {
                sequences[s].n_seen = n_seen;
                sequences[s].segment++; // whatever comes now is not part of what was cut
                observer.truncate(s, n_seen, removed);
            }
        }
    }

    return true;
}

void kvmerge_engine::forget(llama_seq_id seq_id) {
    sequences[seq_id] = {};
    observer.clear(seq_id);
}

void kvmerge_engine::on_seq_keep(llama_seq_id seq_id) {
    for (size_t s = 0; s < sequences.size(); ++s) {
        if ((llama_seq_id) s != seq_id) {
            forget(s);
        }
    }
}

void kvmerge_engine::on_seq_move(llama_seq_id seq_id, llama_pos p0, llama_pos p1, const std::function<llama_pos(llama_pos)> & move) {
    auto & end = sequences[seq_id].pos_merged;

    if (p0 >= end) {
        return;
    }

    // where the last merged position that moves comes to lie; those below p0 stay
    const llama_pos moved = std::max(p0, move(std::min(p1, end) - 1) + 1);

    end = p1 >= end ? moved : std::max(end, moved);
}

void kvmerge_engine::on_seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst) {
    auto & dst = sequences[seq_id_dst];

    dst = sequences[seq_id_src];
    observer.copy(seq_id_src, seq_id_dst);

    const auto & cells = cache.get_cells(0);

    if (cells.seq_pos_max(seq_id_dst) < cells.seq_pos_max(seq_id_src)) {
        // only a beginning was copied
        dst.n_seen = 0;
        for (const auto & [pos, idx] : cells.seq_pos_get(seq_id_dst)) {
            dst.n_seen = std::max(dst.n_seen, tokens[idx].order + 1);
        }
    }
}

//
// merge
//

kvmerge_layer * kvmerge_engine::find_layer(const ggml_tensor * k) {
    for (auto & layer : layers) {
        if (layer.k->data == (k->view_src ? k->view_src->data : k->data)) {
            return &layer;
        }
    }

    return nullptr;
}

uint32_t kvmerge_engine::n_nodes(uint32_t n_tokens) const {
    // an attention and its views
    const uint32_t n_attn = lctx->get_cparams().flash_attn ? 16 : 24;

    uint32_t res = 0;

    for (const auto & layer : layers) {
        res += 24 + n_attn*layer.n_head_kv; // observing, views of what is stored, and one attention per KV head

        if (layer.sum) {
            res += 64*(1 + n_tokens/KVMERGE_SUM_ROWS);
        }
    }

    return res;
}

void kvmerge_engine::load_sums(size_t l, const std::vector<uint32_t> & cells, std::vector<kvmerge_plan> & plans_layer) const {
    const ggml_tensor * sum = layers[l].sum;

    std::vector<float> values(ggml_nelements(sum));
    ggml_backend_tensor_get(sum, values.data(), 0, ggml_nbytes(sum));

    for (size_t h = 0; h < plans_layer.size(); ++h) {
        for (size_t i = 0; i < cells.size(); ++i) {
            plans_layer[h].score[i] = values[h*sum->ne[0] + cells[i]];
        }
    }
}

void kvmerge_engine::store_sums(size_t l, const std::vector<uint32_t> & cells, int32_t n_cells) {
    const ggml_tensor * sum = layers[l].sum;

    std::vector<float> values(ggml_nelements(sum));
    ggml_backend_tensor_get(sum, values.data(), 0, ggml_nbytes(sum));

    std::vector<float> before(cells.size());

    for (int32_t h = 0; h < layers[l].n_head_kv; ++h) {
        const auto & plan = plans[l][h];

        float * row = values.data() + h*sum->ne[0];

        for (size_t i = 0; i < cells.size(); ++i) {
            before[i]     = row[cells[i]];
            row[cells[i]] = 0;
        }

        const auto    kept   = plan.kept();
        const int32_t offset = n_cells - kept.size();

        for (size_t c = 0; c < kept.size(); ++c) {
            row[cells[offset + c]] = before[kept[c]];
        }
    }

    ggml_backend_tensor_set(layers[l].sum, values.data(), 0, ggml_nbytes(sum));
}

void kvmerge_engine::clear_sum(uint32_t idx) {
    const float zero = 0;

    for (auto & layer : layers) {
        for (int32_t h = 0; layer.sum && h < layer.n_head_kv; ++h) {
            ggml_backend_tensor_set(layer.sum, &zero, h*layer.sum->nb[1] + (idx - layer.first)*sizeof(float), sizeof(float));
        }
    }
}

size_t kvmerge_engine::n_head_kv_max() const {
    int32_t res = 0;
    for (const auto & layer : layers) {
        res = std::max(res, layer.n_head_kv);
    }

    return res;
}

size_t kvmerge_engine::bytes_per_cell(const kvmerge_layer & layer) {
    return ggml_row_size(layer.k->type, layer.k->ne[0]) + ggml_row_size(layer.v->type, layer.v->ne[0]);
}

std::vector<uint32_t> kvmerge_engine::sequence_cells(llama_seq_id seq_id) const {
    std::vector<uint32_t> res;

    for (const auto & [pos, idx] : cache.get_cells(0).seq_pos_get(seq_id)) {
        res.push_back(idx);
    }

    // positions may repeat (M-RoPE), the order of tokens does not
    std::stable_sort(res.begin(), res.end(), [&](uint32_t a, uint32_t b) { return tokens[a].order < tokens[b].order; });

    return res;
}

int32_t kvmerge_engine::n_cells(llama_seq_id seq_id, size_t l) const {
    int32_t res = 0;

    for (uint32_t idx : sequence_cells(seq_id)) {
        bool is_held = false;
        for (int32_t h = 0; h < layers[l].n_head_kv; ++h) {
            is_held = is_held || cell(idx, l, h).mass > 0;
        }
        res += is_held;
    }

    return res;
}

const kvmerge_cell & kvmerge_engine::cell(uint32_t idx, size_t layer, int32_t head) const {
    return is_merged[idx] ? merged[layer][head][idx] : tokens[idx];
}

void kvmerge_engine::upload_bias(size_t l, ggml_tensor * dst, uint32_t first) const {
    std::vector<float> bias(ggml_nelements(dst));

    for (int64_t h = 0; h < dst->ne[1]; ++h) {
        for (size_t i = first; i < std::min<size_t>(is_merged.size(), first + dst->ne[0]); ++i) {
            bias[h*dst->ne[0] + i - first] = cell(i, l, h).bias;
        }
    }

    if (dst->type == GGML_TYPE_F16) {
        std::vector<ggml_fp16_t> half(bias.size());
        ggml_fp32_to_fp16_row(bias.data(), half.data(), bias.size());
        ggml_backend_tensor_set(dst, half.data(), 0, ggml_nbytes(dst));
    } else {
        ggml_backend_tensor_set(dst, bias.data(), 0, ggml_nbytes(dst));
    }
}

kvmerge_status kvmerge_engine::check_merge(llama_seq_id seq_id, const std::vector<uint32_t> & cells) const {
    for (uint32_t idx : cells) {
        if (cache.get_cells(0).seq_count(idx) > 1) {
            return kvmerge_error(KVMERGE_ERROR_UNSUPPORTED, "sequence %d shares cells with another sequence: merge before it is copied", seq_id);
        }
    }
    if (cache.get_has_shift()) {
        return kvmerge_error(KVMERGE_ERROR_STATE, "positions were shifted and the shift is not applied yet: decode first");
    }
    if (observer.window(seq_id, sequences[seq_id].n_seen).empty()) {
        return kvmerge_error(KVMERGE_ERROR_STATE, "no query of sequence %d was observed: its tokens were copied or restored, decode at least one", seq_id);
    }

    return KVMERGE_OK;
}

kvmerge_status kvmerge_engine::merge(llama_seq_id seq_id, int32_t n_cells) {
    if (seq_id < 0 || (size_t) seq_id >= sequences.size()) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "seq_id is %d, accepted is 0 to %zu", seq_id, sequences.size() - 1);
    }
    if (n_cells < 1) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_cells is %d, accepted is 1 and more", n_cells);
    }

    const auto cells = sequence_cells(seq_id);

    if ((size_t) n_cells >= cells.size()) {
        return KVMERGE_OK;
    }
    if (const auto status = check_merge(seq_id, cells)) {
        return status;
    }

    // the request ends with this call, whatever returns early or throws: no later decode merges by surprise
    struct request_scope {
        decltype(pending) & request;
        ~request_scope() { request = {}; }
    } scope = { pending };

    pending.seq_id  = seq_id;
    pending.n_cells = n_cells;

    on_init_update(false); // what a batch before asked for is not wanted any more

    lctx->sched_reserve(); // when nothing was decoded since the engine was attached, the cells being restored ones

    // llama_context runs the update, so that graphs are dropped and reserved anew as for any change of the memory
    try {
        lctx->memory_update(true);
    } catch (const std::exception &) {
        if (!pending.has_run || pending.status != KVMERGE_OK) {
            throw;
        }
        // merged is merged: only the graphs are still to be reserved
    }

    const kvmerge_status status = pending.has_run ? pending.status :
        kvmerge_error(KVMERGE_ERROR_STATE, "the update of the memory ended before the merge began: nothing was merged");

    if (status == KVMERGE_OK) {
        kvmerge_error_clear();
    }

    // The merge's own graphs took larger buffers than the model's need. They go back to the system before the new ones come,
    // else these are found where those were, and all of them is resident before anything was computed.
    lctx->sched_free();
    kvmerge_give_back();

    try {
        lctx->sched_reserve();
    } catch (const std::exception & e) {
        LLAMA_LOG_WARN("%s: the graphs are reserved with the next batch: %s\n", __func__, e.what());

        lctx->sched_reserve_later();
    }

    return status;
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

bool kvmerge_engine::on_update(llama_context * lctx_update) {
    GGML_ASSERT(lctx_update == lctx);

    bool updated = false;

    try {
        if (const uint32_t n = std::exchange(n_wanted, 0)) {
            updated = make_room(n);
        }
        if (is_restored) {
            shrink();
            updated     = true;
            is_restored = false;
        }
        if (pending.n_cells > 0) {
            pending.has_run = true;
            pending.status  = run(pending.seq_id, pending.n_cells, n_cells_max());
            updated        = pending.status == KVMERGE_OK;
        }
    } catch (const std::bad_alloc &) {
        pending.has_run = true;
        pending.status  = kvmerge_error(KVMERGE_ERROR_MEMORY, "not enough memory to merge");
    }

    if (updated) {
        gives_back = true;
        kvmerge_give_back();
    }

    return updated;
}

kvmerge_engine::modality_counts kvmerge_engine::count_modalities(const std::vector<uint32_t> & cells) const {
    modality_counts res;

    int64_t last = -1;
    for (uint32_t idx : cells) {
        const auto & cur = cell(idx, 0, 0);

        if (cur.mass > 0 && cur.modality == KVMERGE_TEXT) {
            res.n_text++;
        } else if (cur.mass > 0) {
            res.n_media++;
            res.n_segments += cur.segment != last;
            last = cur.segment;
        }
    }

    return res;
}

int32_t kvmerge_engine::n_text_kept(int32_t n_cells, const std::vector<uint32_t> & cells, llama_seq_id seq_id) const {
    if (params.select != KVMERGE_SELECT_MEDIA) {
        return 0;
    }

    const auto n = count_modalities(cells);

    int32_t n_media = 0; // cells that text leaves to pictures and sounds

    if (room.is_tight) {
        // Cells are short: the media give way first, down to their floor and an eighth of their part, lest a long text leaves
        // nothing of them.
        n_media = (int64_t) n_cells*n.n_media/std::max(1, n.n_text + n.n_media)/8;
        if (room.share > 0) {
            n_media = std::min<int32_t>(n_media, std::ceil(room.share*(sequences[seq_id].n_seen - n.n_text)));
        }
        n_media = std::min(std::max(n_media, params.n_floor*n.n_segments), n.n_media);
    }

    return std::min(n.n_text, std::max(n_cells - n_media, std::min(n_cells, 1)));
}

std::vector<int32_t> kvmerge_engine::layer_budgets(
        const std::vector<std::vector<kvmerge_plan>> & plans, const std::vector<kvmerge_flow> & flows,
        const std::vector<uint32_t> & cells, int32_t n_cells, int32_t n_text, int32_t n_most) const {
    if (params.select != KVMERGE_SELECT_MEDIA) {
        return kvmerge_allocate(plans, flows, cells.size(), n_cells, params.n_sink + kvmerge_n_keep(params), n_most, params);
    }

    // what stays as it is takes its cells in every layer; the layers differ in what is left
    std::vector<kvmerge_plan> first(1);
    for (uint32_t idx : cells) {
        first[0].cells.push_back(cell(idx, 0, 0));
    }
    mark_whole(n_cells, n_text, first);

    const int32_t n_fixed = n_text + std::count_if(first[0].cells.begin(), first[0].cells.end(), [](const auto & cur) { return cur.is_whole; });

    auto res = kvmerge_allocate(plans, flows, cells.size() - n_fixed, n_cells - n_fixed,
            params.n_floor*count_modalities(cells).n_segments, n_most - n_fixed, params);

    for (auto & n : res) {
        n += n_fixed;
    }

    return res;
}

void kvmerge_engine::count_text(int32_t & n_before, int32_t & n_after) const {
    int64_t before  = 0;
    int64_t after   = 0;
    int64_t n_plans = 0;

    for (const auto & layer_plans : plans) {
        for (const auto & plan : layer_plans) {
            for (size_t i = 0; i < plan.cells.size(); ++i) {
                if (plan.cells[i].modality == KVMERGE_TEXT && plan.cells[i].mass > 0) {
                    before++;
                    after += plan.is_kept(i);
                }
            }
            n_plans++;
        }
    }

    n_before = n_plans > 0 ? (before + n_plans/2)/n_plans : 0;
    n_after  = n_plans > 0 ? (after  + n_plans/2)/n_plans : 0;
}

kvmerge_status kvmerge_engine::run(llama_seq_id seq_id, int32_t n_cells, int32_t n_most) {
    const int64_t t_start = ggml_time_us();

    lctx->synchronize();

    const auto cells = sequence_cells(seq_id);

    // From the first store on the cache is no longer what it was: the merge commits, or the sequence goes.
    bool has_begun = false;

    try {
        const auto status = merge_cells(seq_id, cells, n_cells, n_most, t_start, has_begun);

        if (status != KVMERGE_OK && has_begun) {
            clear(seq_id, cells);

            return kvmerge_error(KVMERGE_ERROR_CLEARED, "the backend failed while the cache changed: sequence %d was cleared", seq_id);
        }

        if (status != KVMERGE_OK) {
            shrink(); // back to what the layers stored before
        }

        return status;
    } catch (const std::exception & e) {
        if (!has_begun) {
            shrink();

            const bool is_memory = dynamic_cast<const std::bad_alloc *>(&e);

            return kvmerge_error(is_memory ? KVMERGE_ERROR_MEMORY : KVMERGE_ERROR_COMPUTE, "the merge failed: %s", is_memory ? "not enough memory" : e.what());
        }
        clear(seq_id, cells);

        return kvmerge_error(KVMERGE_ERROR_CLEARED, "memory ran out while the cache changed (%s): sequence %d was cleared", e.what(), seq_id);
    }
}

void kvmerge_engine::clear(llama_seq_id seq_id, const std::vector<uint32_t> & cells) {
    auto & table = cache.v_cells[0];

    // some of them may be what they were, and others what they were to become
    for (uint32_t idx : cells) {
        if (!table.is_empty(idx)) {
            table.rm(idx);
        }
        tokens   [idx] = {};
        is_merged[idx] = 0;

        tokens[idx].order = 0; // it is wiped before it is used again
    }
    bias_is_stale = has_bias;

    forget(seq_id);
    plans.clear();

    lctx->get_memory()->seq_rm(seq_id, -1, -1); // what other parts of the memory hold of it

    shrink();

    version++;

    LLAMA_LOG_ERROR("%s: sequence %d is gone\n", __func__, seq_id);
}

kvmerge_status kvmerge_engine::merge_cells(
        llama_seq_id seq_id, const std::vector<uint32_t> & cells, int32_t n_cells, int32_t n_most, int64_t t_start, bool & has_begun) {
    if (!store_all()) {
        return kvmerge_error(KVMERGE_ERROR_MEMORY, "not enough memory to merge");
    }

    const int32_t n_text = n_text_kept(n_cells, cells, seq_id);

    std::vector<std::vector<kvmerge_plan>> plans_new(layers.size());
    std::vector<kvmerge_flow>              flows_new(layers.size());

    kvmerge_graph graph(lctx);

    std::vector<std::vector<float>> logits(n_head_kv_max()); // of the layer before: the next one writes over them

    const auto take_logits = [&](size_t l) {
        for (size_t h = 0; h < plans_new[l].size(); ++h) {
            logits[h] = plans_new[l][h].take_logits();
        }
    };

    int32_t n_after = 0; // cells of the layer that keeps most

    // what is there
    const auto look = [&](size_t l) {
        plans_new[l].resize(layers[l].n_head_kv);

        const bool ok = kvmerge_parallel(graph, layers[l].n_head_kv, [&](int h) {
            plans_new[l][h].cells.reserve(cells.size());

            for (uint32_t idx : cells) {
                plans_new[l][h].cells.push_back(cell(idx, l, h));
            }
        });

        if (!ok) {
            return kvmerge_error(KVMERGE_ERROR_COMPUTE, "the backend failed in layer %d", layers[l].il);
        }

        mark_whole(n_cells, n_text, plans_new[l]);

        return KVMERGE_OK;
    };

    if (planner) {
        for (size_t l = 0; l < layers.size(); ++l) {
            if (const auto status = look(l)) {
                return status;
            }
        }
        if (const auto status = planner.fill(seq_id, n_cells, n_most, params, plans_new)) {
            return status;
        }
    }

    // score
    const auto score = [&](size_t l) {
        if (!planner) {
            if (const auto status = look(l)) {
                return status;
            }
        }

        for (size_t h = 0; h < plans_new[l].size(); ++h) {
            plans_new[l][h].logits = std::move(logits[h]);
        }

        if (params.score == KVMERGE_SCORE_POSITION) {
            for (auto & plan : plans_new[l]) {
                for (const auto & cur : plan.cells) {
                    plan.score.push_back(cur.order);
                }
            }
        } else if (!kvmerge_score_layer(graph, *this, layers[l], seq_id, sequences[seq_id].n_seen, cells, plans_new[l], flows_new[l])) {
            return kvmerge_error(KVMERGE_ERROR_COMPUTE, "the backend failed to score layer %d", layers[l].il);
        }

        if (params.score == KVMERGE_SCORE_ALL) {
            load_sums(l, cells, plans_new[l]);
        }

        for (auto & plan : plans_new[l]) {
            kvmerge_pool(plan, params);
        }

        if (!kvmerge_needs_logits(params)) {
            take_logits(l);
        }

        return KVMERGE_OK;
    };

    const bool needs_similarity = params.similarity > -1.0f || params.n_member > 0 ||
        params.fold == KVMERGE_FOLD_WEIGHTED || params.fold == KVMERGE_FOLD_EXP || params.fold == KVMERGE_FOLD_GAUSSIAN;

    // select and match
    const auto match = [&](size_t l, int32_t budget) {
        auto & layer_plans = plans_new[l];
        bool   ok          = true;

        if (planner) {
            // the caller has filled them
        } else if (params.select == KVMERGE_SELECT_MOSAIC || params.select == KVMERGE_SELECT_MEDIA) {
            ok = kvmerge_mosaic_layer(graph, *this, layers[l], cells, layer_plans, budget, n_text);
        } else if (params.select == KVMERGE_SELECT_RUNS) {
            ok = kvmerge_runs_layer(graph, *this, layers[l], cells, layer_plans, budget);
        } else {
            ok = kvmerge_parallel(graph, layer_plans.size(), [&](int h) { kvmerge_select(layer_plans[h], budget, params); });
            ok = ok && kvmerge_match_layer(graph, *this, layers[l], flows_new[l], cells, layer_plans);
        }

        ok = ok && graph.run();

        if (ok && needs_similarity) {
            ok = kvmerge_similarity_layer(graph, layers[l], cells, layer_plans) && graph.run();
        }

        ok = ok && kvmerge_parallel(graph, layer_plans.size(), [&](int h) {
            auto & plan = layer_plans[h];

            if (params.match == KVMERGE_MATCH_NONE && !planner) {
                kvmerge_unfold(plan); // the control of a selection that groups
            }

            kvmerge_limit   (plan, params);
            kvmerge_weigh   (plan, params);
            kvmerge_fit_bias(plan, params);
        });

        if (!ok) {
            return kvmerge_error(KVMERGE_ERROR_COMPUTE, "the backend failed to match layer %d", layers[l].il);
        }

        for (auto & plan : layer_plans) {
            n_after = std::max(n_after, plan.n_kept());

            // what the fold has no use for
            for (auto * values : { &plan.similarity, &plan.value_norm }) {
                values->clear();
                values->shrink_to_fit();
            }
        }
        take_logits(l);

        return KVMERGE_OK;
    };

    // One layer after the other where the sizes do not depend on the scores: the logits of all layers would be a lot.
    const bool by_score = !planner && kvmerge_allocates_by_score(params);

    const auto allocate = [&]() { return layer_budgets(plans_new, flows_new, cells, n_cells, n_text, n_most); };

    std::vector<int32_t> budgets(layers.size());
    if (!by_score && !planner) {
        budgets = allocate();
    }

    int64_t t_score = 0; // us

    for (size_t l = 0; l < layers.size(); ++l) {
        const int64_t t_layer = ggml_time_us();

        if (const auto status = score(l)) {
            return status;
        }

        t_score += ggml_time_us() - t_layer;

        if (!by_score) {
            if (const auto status = match(l, budgets[l])) {
                return status;
            }
        }
    }

    if (by_score) {
        budgets = allocate();

        for (size_t l = 0; l < layers.size(); ++l) {
            if (const auto status = match(l, budgets[l])) {
                return status;
            }
        }
    }

    const int64_t t_match = ggml_time_us();

    logits.clear();
    logits.shrink_to_fit();

    // All memory is had before the cache changes: the buffers of the folds' graphs, and what tells of the cells.
    for (size_t l = 0; l < layers.size(); ++l) {
        kvmerge_fold_layer(graph, *this, layers[l], cells, plans_new[l], n_after, &kvmerge_graph::reserve);

        if (!graph.reserve()) {
            return kvmerge_error(KVMERGE_ERROR_MEMORY, "not enough memory to fold layer %d", layers[l].il);
        }
        for (auto & head : merged[l]) {
            kvmerge_may_fail();
            head.reserve(*std::max_element(cells.begin(), cells.begin() + n_after) + 1);
        }
    }

    // fold: from here on the cache changes
    has_begun = true;

    for (size_t l = 0; l < layers.size(); ++l) {
        if (!kvmerge_fold_layer(graph, *this, layers[l], cells, plans_new[l], n_after) || !graph.run()) {
            return kvmerge_error(KVMERGE_ERROR_COMPUTE, "the backend failed to fold layer %d", layers[l].il);
        }
    }

    plans = std::move(plans_new);
    flows = std::move(flows_new);

    compact(seq_id, cells, n_after);

    // what tells of the merge stays; what only the fold needed goes
    for (auto & layer_plans : plans) {
        for (auto & plan : layer_plans) {
            for (auto * values : { &plan.weight, &plan.bias }) {
                values->clear();
                values->shrink_to_fit();
            }
        }
    }

    for (size_t l = 0; l < layers.size() && layers[l].sum; ++l) {
        store_sums(l, cells, n_after);
    }

    has_begun = false; // it is done

    shrink();

    const int64_t t_end = ggml_time_us();

    stats.n_merges++;
    count_text(stats.n_text_before, stats.n_text_after);
    stats.n_tokens       = sequences[seq_id].n_seen;
    stats.n_cells_before = cells.size();
    stats.n_cells_after  = n_after;
    stats.bytes_after    = 0;
    for (size_t l = 0; l < layers.size(); ++l) {
        int32_t n_held = 0;
        for (const auto & plan : plans[l]) {
            n_held = std::max(n_held, plan.n_kept());
        }
        stats.bytes_after += n_held*bytes_per_cell(layers[l]);
    }
    if (!keeps_plans) {
        keep_plans(false);
    }

    stats.t_score_us     = t_score;
    stats.t_match_us     = t_match - t_start - t_score;
    stats.t_fold_us      = t_end   - t_match;
    stats.t_total_us     = t_end   - t_start;

    recent[stats.n_merges % MAX_RECENT] = stats;
    n_recent++;

    LLAMA_LOG_INFO("%s: sequence %d: %d tokens, %d positions, %zu -> %d cells in %.1f ms\n", __func__, seq_id,
            stats.n_tokens, cache.seq_pos_max(seq_id) + 1, cells.size(), n_after, stats.t_total_us/1000.0);

    return KVMERGE_OK;
}

void kvmerge_engine::compact(llama_seq_id seq_id, const std::vector<uint32_t> & cells, int32_t n_cells) {
    const size_t n_merged = *std::max_element(cells.begin(), cells.begin() + n_cells) + 1;

    // what the pivots hold now
    for (size_t l = 0; l < layers.size(); ++l) {
        for (int32_t h = 0; h < layers[l].n_head_kv; ++h) {
            const auto & plan = plans[l][h];
            const auto   kept = plan.kept();

            std::vector<float> mass(plan.cells.size());
            for (size_t i = 0; i < plan.cells.size(); ++i) {
                if (plan.target[i] >= 0) {
                    mass[plan.target[i]] += plan.cells[i].mass;
                }
            }

            auto & dst = merged[l][h];
            dst.reserve(n_merged);
            dst.resize(std::max(dst.size(), n_merged));

            // a layer that keeps fewer cells than the others keeps them at the end: nothing is seen in front of them
            const int32_t offset = n_cells - kept.size();

            for (int32_t c = 0; c < offset; ++c) {
                dst[cells[c]] = {};
                dst[cells[c]].mass = 0;
                dst[cells[c]].bias = -INFINITY;
            }
            for (size_t c = 0; c < kept.size(); ++c) {
                auto cur = plan.cells[kept[c]];

                cur.mass = mass[kept[c]];
                cur.bias = plan.bias[c];

                dst[cells[offset + c]] = cur;
            }
        }
    }

    // The table of cells is shared by all layers and heads. A merged cell takes position and order from the pivot of the
    // widest plan: only their sequence matters, all of it lies in the past of the tokens to come.
    // The last n_keep tokens are the same everywhere, so that they can still be removed one by one.
    auto & table = cache.v_cells[0];

    const kvmerge_plan * widest = &plans[0][0];
    for (const auto & layer_plans : plans) {
        for (const auto & plan : layer_plans) {
            widest = plan.n_kept() > widest->n_kept() ? &plan : widest;
        }
    }

    const auto kept = widest->kept();

    std::vector<llama_pos>         pos(n_cells);
    std::vector<llama_kv_cell_ext> ext(n_cells);
    std::vector<kvmerge_cell>      cur(n_cells);

    for (int32_t c = 0; c < n_cells; ++c) {
        pos[c] = table.pos_get(cells[kept[c]]);
        ext[c] = table.ext_get(cells[kept[c]]);
        cur[c] = tokens[cells[kept[c]]];
    }

    const llama_pos pos_last = table.pos_get(cells.back());

    for (uint32_t idx : cells) {
        table.rm(idx);
        tokens   [idx] = {};
        is_merged[idx] = 0;
    }

    // What is read next follows on the last token, and a batch of another sequence may come between: so the last cell stands
    // where that token did, also where the token went into another cell.
    llama_pos & pos_merged = sequences[seq_id].pos_merged;

    pos_merged = pos.back() < pos_last ? pos_last + 1 : pos[std::max(0, n_cells - std::min(kvmerge_n_keep(params), n_cells))];
    pos.back() = pos_last;

    for (int32_t c = 0; c < n_cells; ++c) {
        table.pos_set(cells[c], pos[c]);
        table.ext_set(cells[c], ext[c]);
        table.seq_add(cells[c], seq_id);

        tokens   [cells[c]] = cur[c];
        is_merged[cells[c]] = 1;
    }

    cache.v_heads[0] = table.used_max_p1();

    for (const auto & layer : merged) {
        for (const auto & head : layer) {
            for (int32_t c = 0; c < n_cells; ++c) {
                has_bias = has_bias || head[cells[c]].bias != 0.0f;
            }
        }
    }

    if (has_bias) {
        is_per_head = true;
        for (size_t l = 0; l < layers.size(); ++l) {
            upload_bias(l);
        }
    }

    version++;
}

#include "kvmerge.h"

#include "kvmerge-engine.h"
#include "kvmerge-error.h"
#include "kvmerge-room.h"

#include "llama-context.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <exception>

// nothing may be thrown across the C API
template <typename F>
static int32_t guarded(F && f) {
    try {
        kvmerge_error_clear();

        return f();
    } catch (const std::bad_alloc &) {
        return kvmerge_error(KVMERGE_ERROR_MEMORY, "out of memory");
    } catch (const std::exception & e) {
        return kvmerge_error(KVMERGE_ERROR_COMPUTE, "%s", e.what());
    }
}

static int32_t check_layer(const kvmerge_engine * engine, int32_t layer) {
    if (layer < 0 || (size_t) layer >= engine->layers.size()) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "layer is %d, accepted is 0 to %zu", layer, engine->layers.size() - 1);
    }

    return KVMERGE_OK;
}

static int32_t check_seq(const kvmerge_engine * engine, int32_t seq_id) {
    if (seq_id < 0 || (uint32_t) seq_id >= engine->cache.get_n_seq_max()) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "seq_id is %d, accepted is 0 to %u", seq_id, engine->cache.get_n_seq_max() - 1);
    }

    return KVMERGE_OK;
}

static int32_t check_capacity(size_t n, int32_t capacity) {
    if (capacity < 0 || (size_t) capacity < n) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "capacity is %d, %zu are needed", capacity, n);
    }

    return KVMERGE_OK;
}

int32_t kvmerge_api_version(void) {
    return KVMERGE_API_VERSION;
}

const char * kvmerge_error_message(void) {
    return kvmerge_error_text();
}

int32_t kvmerge_attach(struct llama_context * ctx, const struct kvmerge_params * params, struct kvmerge_engine ** out) {
    return guarded([&]() -> int32_t {
        if (!ctx || !params || !out) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "ctx, params and out must not be NULL");
        }

        return kvmerge_engine::attach(ctx, *params, out);
    });
}

void kvmerge_detach(struct kvmerge_engine * engine) {
    if (engine) {
        guarded([&]() -> int32_t { engine->detach(); return KVMERGE_OK; });
    }
}

int32_t kvmerge_set_params(struct kvmerge_engine * engine, const struct kvmerge_params * params) {
    return guarded([&]() -> int32_t { return engine->set_params(*params); });
}

int32_t kvmerge_media_begin(struct kvmerge_engine * engine, int32_t modality) {
    return guarded([&]() -> int32_t { return engine->media_begin(modality); });
}

int32_t kvmerge_media_weights(struct kvmerge_engine * engine, const float * weights, int32_t n) {
    return guarded([&]() -> int32_t { return engine->media_weights(weights, n); });
}

int32_t kvmerge_media_end(struct kvmerge_engine * engine) {
    return guarded([&]() -> int32_t { return engine->media_end(); });
}

int32_t kvmerge_merge(struct kvmerge_engine * engine, int32_t seq_id, int32_t n_cells) {
    return guarded([&]() -> int32_t { return engine->merge(seq_id, { n_cells }, INFINITY); });
}

int32_t kvmerge_merge_within(struct kvmerge_engine * engine, int32_t seq_id, const int32_t * n_cells, int32_t n, float tolerance) {
    return guarded([&]() -> int32_t {
        return engine->merge(seq_id, std::vector<int32_t>(n_cells, n_cells + std::max(0, n)), tolerance);
    });
}

int32_t kvmerge_set_room(struct kvmerge_engine * engine, int32_t n_cells_max, float share, int32_t n_whole) {
    return guarded([&]() -> int32_t { return engine->set_room(n_cells_max, share, n_whole); });
}

int32_t kvmerge_set_idle(struct kvmerge_engine * engine, int32_t seq_id, bool is_idle) {
    return guarded([&]() -> int32_t {
        if (const int32_t status = check_seq(engine, seq_id)) {
            return status;
        }
        engine->set_idle(seq_id, is_idle);

        return KVMERGE_OK;
    });
}

bool kvmerge_was_cleared(struct kvmerge_engine * engine, int32_t seq_id) {
    return check_seq(engine, seq_id) == KVMERGE_OK && engine->take_cleared(seq_id);
}

void kvmerge_set_planner(struct kvmerge_engine * engine, kvmerge_planner_fn plan, void * data) {
    engine->planner = { plan, data };
}

void kvmerge_trim(void) {
    kvmerge_give_back();
}

int32_t kvmerge_lay_out(struct kvmerge_engine * engine, bool merged) {
    return guarded([&]() -> int32_t { return engine->lay_out(merged); });
}

int32_t kvmerge_size(const struct kvmerge_engine * engine) {
    return engine->cache.get_size();
}

int64_t kvmerge_bytes(const struct kvmerge_engine * engine) {
    return engine->bytes();
}

int32_t kvmerge_layer_cells(const struct kvmerge_engine * engine, int32_t seq_id, int32_t layer) {
    return guarded([&]() -> int32_t {
        if (const int32_t status = check_seq(engine, seq_id)) {
            return status;
        }
        const int32_t status = check_layer(engine, layer);

        return status ? status : engine->n_cells(seq_id, layer);
    });
}

int64_t kvmerge_layer_bytes(const struct kvmerge_engine * engine, int32_t layer) {
    if (const int32_t status = check_layer(engine, layer)) {
        return status;
    }

    const auto & cur = engine->layers[layer];

    int64_t res = 0;
    for (const ggml_tensor * t : { cur.k, cur.v, cur.bias, cur.sum }) {
        res += t ? ggml_nbytes(t) : 0;
    }

    return res;
}

int32_t kvmerge_n_cells(const struct kvmerge_engine * engine, int32_t seq_id) {
    return guarded([&]() -> int32_t {
        const int32_t status = check_seq(engine, seq_id);

        return status ? status : (int32_t) engine->cache.get_cells(seq_id).seq_pos_get(seq_id).size();
    });
}

int32_t kvmerge_n_tokens(const struct kvmerge_engine * engine, int32_t seq_id) {
    return guarded([&]() -> int32_t {
        const int32_t status = check_seq(engine, seq_id);

        return status ? status : engine->n_seen(seq_id);
    });
}

int32_t kvmerge_get_stats(const struct kvmerge_engine * engine, struct kvmerge_stats * stats) {
    *stats = engine->stats;

    return KVMERGE_OK;
}

int32_t kvmerge_get_merge(const struct kvmerge_engine * engine, int32_t n_back, struct kvmerge_stats * stats) {
    return guarded([&]() -> int32_t {
        if (n_back < 0 || n_back >= kvmerge_engine::MAX_RECENT) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_back is %d, accepted is 0 to %d", n_back, kvmerge_engine::MAX_RECENT - 1);
        }
        if (n_back >= engine->n_recent) {
            return kvmerge_error(KVMERGE_ERROR_STATE, "there is no merge %d before the last one", n_back);
        }

        *stats = engine->recent[(engine->stats.n_merges - n_back) % kvmerge_engine::MAX_RECENT];

        return KVMERGE_OK;
    });
}

int32_t kvmerge_get_flow(const struct kvmerge_engine * engine, float * rho, float * text_to_media, float * media_to_text, int32_t capacity) {
    return guarded([&]() -> int32_t {
        const auto & flows = engine->flows;

        if (const int32_t status = check_capacity(flows.size(), capacity)) {
            return status;
        }

        for (size_t l = 0; l < flows.size(); ++l) {
            if (rho)           { rho          [l] = flows[l].rho;           }
            if (text_to_media) { text_to_media[l] = flows[l].text_to_media; }
            if (media_to_text) { media_to_text[l] = flows[l].media_to_text; }
        }

        return flows.size();
    });
}

void kvmerge_save_all_queries(struct kvmerge_engine * engine, bool all) {
    engine->saves_all_queries = all;
}

void kvmerge_keep_plans(struct kvmerge_engine * engine, bool keep) {
    engine->keep_plans(keep);
}

int32_t kvmerge_get_plan(
        const struct kvmerge_engine * engine, int32_t layer, int32_t head,
        int32_t * order, uint8_t * modality, int32_t * segment, uint8_t * fate, int32_t * target, float * score, int32_t capacity) {
    return guarded([&]() -> int32_t {
        if (engine->plans.empty()) {
            return kvmerge_error(KVMERGE_ERROR_STATE, "nothing was merged yet, or what a merge did to each cell is not kept (kvmerge_keep_plans)");
        }
        if (const int32_t status = check_layer(engine, layer)) {
            return status;
        }
        if (head < 0 || (size_t) head >= engine->plans[layer].size()) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "head is %d, accepted is 0 to %zu", head, engine->plans[layer].size() - 1);
        }

        const auto & plan = engine->plans[layer][head];
        const size_t n    = plan.cells.size();

        if (!order && !modality && !segment && !fate && !target && !score) {
            return n;
        }
        if (const int32_t status = check_capacity(n, capacity)) {
            return status;
        }

        for (size_t i = 0; i < n; ++i) {
            if (order)    { order   [i] = plan.cells[i].order;    }
            if (modality) { modality[i] = plan.cells[i].modality; }
            if (segment)  { segment [i] = plan.cells[i].segment;  }
            if (fate)     { fate    [i] = plan.fate(i);           }
            if (target)   { target  [i] = plan.target[i];         }
            if (score)    { score   [i] = plan.score[i];          }
        }

        return n;
    });
}

//
// debugging
//

// one row of any type as F32
static void row_to_f32(ggml_type type, const void * src, float * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        std::copy_n(static_cast<const float *>(src), n, dst);
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

// rows [n][n_embd] of the given cells, in a tensor that begins with the cell `first`; zeros for those before it
static void read_rows(const ggml_tensor * t, uint32_t first, int64_t n_embd, bool trans, const std::vector<uint32_t> & cells, float * dst) {
    const int64_t n_rows = t->ne[1];

    std::fill_n(dst, cells.size()*n_embd, 0.0f);

    std::vector<uint8_t> bytes;

    if (!trans) {
        bytes.resize(ggml_row_size(t->type, n_embd));

        for (size_t i = 0; i < cells.size(); ++i) {
            if (cells[i] >= first) {
                ggml_backend_tensor_get(t, bytes.data(), (cells[i] - first)*t->nb[1], bytes.size());
                row_to_f32(t->type, bytes.data(), dst + i*n_embd, n_embd);
            }
        }
    } else {
        bytes.resize(n_rows*ggml_type_size(t->type));
        std::vector<float> row(n_rows);

        for (int64_t e = 0; e < n_embd; ++e) {
            ggml_backend_tensor_get(t, bytes.data(), e*bytes.size(), bytes.size());
            row_to_f32(t->type, bytes.data(), row.data(), n_rows);

            for (size_t i = 0; i < cells.size(); ++i) {
                if (cells[i] >= first) {
                    dst[i*n_embd + e] = row[cells[i] - first];
                }
            }
        }
    }
}

int32_t kvmerge_read_cells(
        const struct kvmerge_engine * engine, int32_t seq_id, int32_t layer,
        float * k, float * v, float * bias, float * mass, int32_t * order, int32_t capacity) {
    return guarded([&]() -> int32_t {
        if (const int32_t status = check_seq(engine, seq_id)) {
            return status;
        }
        if (const int32_t status = check_layer(engine, layer)) {
            return status;
        }

        engine->lctx->synchronize();

        const auto   cells = engine->sequence_cells(seq_id);
        const auto & cur   = engine->layers[layer];

        if (const int32_t status = check_capacity(cells.size(), capacity)) {
            return status;
        }

        if (k) { read_rows(cur.k, cur.first, (int64_t) cur.n_embd_head_k*cur.n_head_kv, false,           cells, k); }
        if (v) { read_rows(cur.v, cur.first, (int64_t) cur.n_embd_head_v*cur.n_head_kv, engine->v_trans, cells, v); }

        for (size_t i = 0; i < cells.size(); ++i) {
            for (int32_t h = 0; h < cur.n_head_kv; ++h) {
                const auto & cell = engine->cell(cells[i], layer, h);

                if (bias)  { bias [i*cur.n_head_kv + h] = cell.bias;  }
                if (mass)  { mass [i*cur.n_head_kv + h] = cell.mass;  }
                if (order) { order[i*cur.n_head_kv + h] = cell.order; }
            }
        }

        return cells.size();
    });
}

int32_t kvmerge_read_queries(
        const struct kvmerge_engine * engine, int32_t seq_id, int32_t layer,
        float * q, int32_t * order, uint8_t * modality, uint8_t * proxy, float * scale, int32_t capacity) {
    return guarded([&]() -> int32_t {
        if (const int32_t status = check_seq(engine, seq_id)) {
            return status;
        }
        if (const int32_t status = check_layer(engine, layer)) {
            return status;
        }

        engine->lctx->synchronize();

        const auto & observer = engine->observer;

        auto slots = observer.window(seq_id, engine->n_seen(seq_id));

        const size_t n_window = slots.size();

        for (int32_t slot : observer.samples(seq_id, engine->n_seen(seq_id))) {
            slots.push_back(slot);
        }

        if (!q && !order && !modality && !proxy) {
            return slots.size();
        }
        if (const int32_t status = check_capacity(slots.size(), capacity)) {
            return status;
        }

        const ggml_tensor * t = engine->layers[layer].q;

        for (size_t i = 0; i < slots.size(); ++i) {
            if (q)        { ggml_backend_tensor_get(t, q + i*t->ne[0], slots[i]*t->nb[1], t->nb[1]); }
            if (order)    { order   [i] = observer.row(slots[i]).order;    }
            if (modality) { modality[i] = observer.row(slots[i]).modality; }
            if (proxy)    { proxy   [i] = i < n_window;                    }
        }
        if (scale) {
            *scale = engine->layers[layer].kq_scale;
        }

        return slots.size();
    });
}

int32_t kvmerge_get_layer(
        const struct kvmerge_engine * engine, int32_t layer,
        int32_t * il, int32_t * n_head, int32_t * n_head_kv, int32_t * n_embd_head_k, int32_t * n_embd_head_v) {
    return guarded([&]() -> int32_t {
        if (const int32_t status = check_layer(engine, layer)) {
            return status;
        }

        const auto & cur = engine->layers[layer];

        if (il)            { *il            = cur.il;            }
        if (n_head)        { *n_head        = cur.n_head;        }
        if (n_head_kv)     { *n_head_kv     = cur.n_head_kv;     }
        if (n_embd_head_k) { *n_embd_head_k = cur.n_embd_head_k; }
        if (n_embd_head_v) { *n_embd_head_v = cur.n_embd_head_v; }

        return KVMERGE_OK;
    });
}

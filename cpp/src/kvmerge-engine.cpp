#include "kvmerge-engine.h"

#include "kvmerge-accumulate.h"

#include "llama-context.h"
#include "llama-kv-cache.h"

#include <algorithm>

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
        res += 32 + n_attn*layer.n_head_kv; // observing, views of what is stored, and one attention per KV head

        if (layer.sum) {
            res += 64*(1 + n_tokens/KVMERGE_SUM_ROWS);
        }
    }

    return res;
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

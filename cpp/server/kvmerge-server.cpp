#include "kvmerge-server.h"

#include "kvmerge-flags.h"

#include "common.h"
#include "mtmd.h"
#include "server-common.h"

#include <algorithm>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <vector>

static constexpr double MIB = 1024.0*1024.0;

namespace {

struct slot_figures {
    int32_t n_tokens = 0;
    int32_t n_cells  = 0; // as the mean over the layers
    int64_t n_bytes  = 0;
};

// what the reports say: they are asked for while others decode
struct figures {
    std::vector<slot_figures> slots;

    int32_t n_cells_max = 0;
    int32_t n_cells     = 0; // held, all slots together
    int64_t n_bytes     = 0; // as they are allocated
    int32_t n_merges    = 0;
    int64_t t_merges_us = 0;
    int32_t n_reread    = 0; // prompts that were read again because they left the cache where it was merged
};

struct server_state {
    kvmerge_flags    flags;
    llama_context  * ctx    = nullptr;
    kvmerge_engine * engine = nullptr;

    int32_t n_batch_max = 0; // 0: no limit

    std::mutex mutex; // of the figures
    figures    now;
};

} // namespace

static server_state state;

//
// start
//

// flags that cannot go together; an empty string when they can
static std::string conflict(const common_params & params) {
    if (params.embedding || (params.pooling_type != LLAMA_POOLING_TYPE_UNSPECIFIED && params.pooling_type != LLAMA_POOLING_TYPE_NONE)) {
        return "--embedding and --reranking keep no cache, so there is nothing to merge";
    }
    if (params.ctx_shift) {
        return "--context-shift drops tokens by their position, which merged cells no longer have one by one; --kv-max-cells makes room instead";
    }
    if (params.n_cache_reuse > 0) {
        return "--cache-reuse moves cells to other positions, and merged ones stand for several";
    }
    for (const auto type : params.speculative.types) {
        if (type != COMMON_SPECULATIVE_TYPE_NONE) {
            return "speculative decoding takes back what it proposed from cells that may have been merged by then";
        }
    }
    if (params.speculative.has_dft()) {
        return "a draft model (--model-draft) is for speculative decoding, which takes back cells that may have been merged";
    }

    return "";
}

bool kvmerge_server_begin(common_params & params) {
    state.ctx    = nullptr;
    state.engine = nullptr;

    try {
        state.flags = kvmerge_read_flags(params);
    } catch (const std::invalid_argument & e) {
        SRV_ERR("%s\n", e.what());
        return false;
    }

    if (!state.flags.is_on()) {
        return true;
    }

    const std::string why = conflict(params);
    if (!why.empty()) {
        SRV_ERR("--kv-merge %s does not go with this: %s\n", state.flags.policy.c_str(), why.c_str());
        return false;
    }

    params.kv_unified = true; // the slots share the cells

    kvmerge_begin_small(std::max(params.n_ubatch, 256));

    return true;
}

bool kvmerge_server_attach(llama_context * ctx) {
    kvmerge_begin_small(0);

    auto & flags = state.flags;

    if (!flags.is_on()) {
        return true;
    }

    const auto failed = [&]() {
        SRV_ERR("--kv-merge %s: %s\n", flags.policy.c_str(), kvmerge_error_message());
        return false;
    };

    if (kvmerge_attach(ctx, &flags.params, &state.engine) != KVMERGE_OK) {
        return failed();
    }

    int64_t n_cells_max = flags.n_cells_max;

    if (flags.n_bytes_max > 0) {
        n_cells_max = std::min<int64_t>(flags.n_bytes_max*kvmerge_size(state.engine)/kvmerge_bytes(state.engine), INT32_MAX);

        if (n_cells_max < 512) {
            SRV_ERR("--kv-max-cells: %.1f MiB are %d cells of this model and cache type, at least 512 are needed\n",
                    flags.n_bytes_max/MIB, (int) n_cells_max);
            return false;
        }
    }

    if (kvmerge_set_room(state.engine, n_cells_max, flags.share, flags.n_whole) != KVMERGE_OK) {
        return failed();
    }
    kvmerge_keep_plans(state.engine, false);

    state.ctx             = ctx;
    state.n_batch_max     = n_cells_max/4;
    state.now             = {};
    state.now.n_cells_max = n_cells_max;

    SRV_INF("merging with %s, --kv-budget %s (kept), %s\n", flags.policy.c_str(), flags.budget.c_str(),
            n_cells_max > 0 ? string_format("at most %d cells", (int) n_cells_max).c_str() : "no --kv-max-cells");

    return true;
}

int32_t kvmerge_server_n_batch(int32_t n_batch) {
    return state.engine && state.n_batch_max > 0 ? std::min(n_batch, state.n_batch_max) : n_batch;
}

bool kvmerge_server_can_shift() {
    return !state.engine;
}

//
// prompts
//

int32_t kvmerge_server_reuse(int32_t id_slot, const server_tokens & tokens, int32_t n_past) {
    if (!state.engine || n_past == 0) {
        return n_past;
    }

    auto * mem = llama_get_memory(state.ctx);

    if (llama_memory_seq_rm(mem, id_slot, tokens.pos_next(n_past), -1)) {
        return n_past;
    }

    SRV_INF("slot %d: reading the whole prompt again: it leaves what the slot holds after %d of %d tokens, and what comes before was merged\n",
            id_slot, n_past, (int) tokens.size());

    llama_memory_seq_rm(mem, id_slot, -1, -1);

    std::lock_guard<std::mutex> lock(state.mutex);
    state.now.n_reread++;

    return 0;
}

int32_t kvmerge_server_merge_at(const server_tokens & prompt, int32_t n_past, int32_t last_user_pos) {
    if (!state.engine) {
        return 0;
    }

    if (state.flags.params.select == KVMERGE_SELECT_MEDIA && last_user_pos > 0) {
        bool shows = false;
        for (size_t i = last_user_pos; i < prompt.size(); ++i) {
            shows = shows || prompt[i] == LLAMA_TOKEN_NULL;
        }

        if (!shows) {
            return last_user_pos > n_past ? last_user_pos : 0;
        }
    }

    return prompt.size();
}

kvmerge_server_media::kvmerge_server_media(const mtmd_input_chunk * chunk) {
    if (state.engine) {
        kvmerge_media_begin(state.engine, mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_AUDIO ? KVMERGE_AUDIO : KVMERGE_IMAGE);
    }
}

kvmerge_server_media::~kvmerge_server_media() {
    if (state.engine) {
        kvmerge_media_end(state.engine);
    }
}

void kvmerge_server_idle(int32_t id_slot, bool is_idle) {
    if (state.engine) {
        kvmerge_set_idle(state.engine, id_slot, is_idle);
    }
}

bool kvmerge_server_was_cleared(int32_t id_slot) {
    if (!state.engine || !kvmerge_was_cleared(state.engine, id_slot)) {
        return false;
    }

    SRV_WRN("slot %d: a merge broke off, and its cells are gone (%s): what it held is read again\n", id_slot, kvmerge_error_message());

    return true;
}

void kvmerge_server_decoded() {
    if (!state.engine) {
        return;
    }

    kvmerge_stats stats;
    kvmerge_get_stats(state.engine, &stats);

    std::lock_guard<std::mutex> lock(state.mutex);

    // as many as there are slots; a slot that was restored brings the number of its own past, and no merge
    const int32_t n_new = stats.n_merges - state.now.n_merges;

    state.now.n_merges = stats.n_merges;

    for (int32_t n_back = std::min(n_new, 64) - 1; n_back >= 0; --n_back) {
        if (kvmerge_get_merge(state.engine, n_back, &stats) != KVMERGE_OK) {
            continue;
        }

        state.now.t_merges_us += stats.t_total_us;

        SRV_INF("merged %d cells into %d (%d tokens, text: %d into %d), %.2f MiB into %.2f MiB, %.1f ms\n",
                stats.n_cells_before, (int) (stats.bytes_after/stats.bytes_per_cell), stats.n_tokens, stats.n_text_before, stats.n_text_after,
                stats.n_cells_before*stats.bytes_per_cell/MIB, stats.bytes_after/MIB, stats.t_total_us/1000.0);
    }
}

// What the tokens of a slot are.
namespace {

struct token_counts {
    int32_t n_text        = 0;
    int32_t n_media       = 0; // without the pictures that are left as they are
    int32_t n_media_whole = 0;
    int32_t n_segments    = 0;
};

} // namespace

static token_counts count(const server_tokens & tokens, int32_t n_whole) {
    token_counts res;

    std::vector<int32_t> images; // tokens of each

    for (size_t i = 0; i < tokens.size();) {
        if (tokens[i] != LLAMA_TOKEN_NULL) {
            res.n_text++;
            i++;
            continue;
        }

        const auto * chunk = tokens.find_chunk(i).get();
        const int32_t n    = mtmd_input_chunk_get_n_tokens(chunk);

        if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_IMAGE) {
            images.push_back(n);
        }
        res.n_media += n;
        res.n_segments++;
        i += n;
    }

    for (size_t i = images.size() - std::min<size_t>(images.size(), n_whole); i < images.size(); ++i) {
        res.n_media       -= images[i];
        res.n_media_whole += images[i];
    }

    return res;
}

bool kvmerge_server_merge(int32_t id_slot, const server_tokens & tokens) {
    if (!state.engine) {
        return true;
    }

    const auto n = count(tokens, state.flags.n_whole);

    const int32_t n_kept = state.flags.n_kept(n.n_text, n.n_media, n.n_segments, n.n_media_whole);

    if (kvmerge_n_cells(state.engine, id_slot) <= n_kept) {
        return true;
    }

    const int32_t status = kvmerge_merge(state.engine, id_slot, n_kept);

    if (status == KVMERGE_ERROR_CLEARED) {
        kvmerge_was_cleared(state.engine, id_slot); // it is told here
    }
    if (status != KVMERGE_OK) {
        SRV_WRN("slot %d was not merged: %s\n", id_slot, kvmerge_error_message());
    }
    kvmerge_server_decoded();

    return status != KVMERGE_ERROR_CLEARED;
}

//
// reports
//

void kvmerge_server_update(int32_t n_slots) {
    if (!state.engine) {
        return;
    }

    kvmerge_stats stats;
    kvmerge_get_stats(state.engine, &stats);

    std::vector<slot_figures> slots(n_slots);
    int32_t n_cells = 0;

    for (int32_t s = 0; s < n_slots; ++s) {
        int64_t sum = 0;
        for (int32_t l = 0; l < stats.n_layers; ++l) {
            sum += kvmerge_layer_cells(state.engine, s, l);
        }

        slots[s].n_tokens = kvmerge_n_tokens(state.engine, s);
        slots[s].n_cells  = (sum + stats.n_layers/2)/stats.n_layers;
        slots[s].n_bytes  = sum*stats.bytes_per_cell/stats.n_layers;

        n_cells += slots[s].n_cells;
    }

    std::lock_guard<std::mutex> lock(state.mutex);

    state.now.slots   = std::move(slots);
    state.now.n_cells = n_cells;
    state.now.n_bytes = kvmerge_bytes(state.engine);
}

json kvmerge_server_props() {
    if (!state.flags.is_on()) {
        return nullptr;
    }

    std::lock_guard<std::mutex> lock(state.mutex);

    int32_t n_tokens = 0;
    for (const auto & slot : state.now.slots) {
        n_tokens += slot.n_tokens;
    }

    return {
        { "policy",           state.flags.policy },
        { "budget",           state.flags.budget },
        { "max_cells",        state.now.n_cells_max > 0 ? json(state.now.n_cells_max) : json(nullptr) },
        { "keep_last_images", state.flags.n_whole },
        { "tokens",           n_tokens },
        { "cells",            state.now.n_cells },
        { "bytes",            state.now.n_bytes },
        { "merges",           state.now.n_merges },
    };
}

json kvmerge_server_slot(int32_t id_slot) {
    if (!state.flags.is_on()) {
        return nullptr;
    }

    std::lock_guard<std::mutex> lock(state.mutex);

    const auto slot = (size_t) id_slot < state.now.slots.size() ? state.now.slots[id_slot] : slot_figures {};

    return {
        { "tokens", slot.n_tokens },
        { "cells",  slot.n_cells  },
        { "bytes",  slot.n_bytes  },
    };
}

std::string kvmerge_server_metrics() {
    if (!state.flags.is_on()) {
        return "";
    }

    std::lock_guard<std::mutex> lock(state.mutex);

    int64_t n_tokens = 0;
    for (const auto & slot : state.now.slots) {
        n_tokens += slot.n_tokens;
    }

    const struct {
        const char * name;
        const char * type;
        const char * help;
        double       value;
    } items[] = {
        { "kv_tokens",              "gauge",   "Tokens that the cells of the KV cache stand for",                (double) n_tokens              },
        { "kv_cells",               "gauge",   "Cells that the KV cache holds, as the mean over the layers",     (double) state.now.n_cells     },
        { "kv_cells_max",           "gauge",   "Cells that the KV cache may have, 0 without a limit",            (double) state.now.n_cells_max },
        { "kv_bytes",               "gauge",   "Bytes that the KV cache takes",                                  (double) state.now.n_bytes     },
        { "kv_merges_total",        "counter", "Merges of the KV cache",                                         (double) state.now.n_merges    },
        { "kv_merge_seconds_total", "counter", "Time spent merging",                                             state.now.t_merges_us/1e6      },
        { "kv_reread_total",        "counter", "Prompts read from their start as they left merged cells",        (double) state.now.n_reread    },
    };

    std::ostringstream res;
    res.precision(15); // bytes to the byte
    for (const auto & item : items) {
        res << "# HELP kvmerge:" << item.name << " " << item.help  << "\n"
            << "# TYPE kvmerge:" << item.name << " " << item.type  << "\n"
            << "kvmerge:"        << item.name << " " << item.value << "\n";
    }

    return res.str();
}

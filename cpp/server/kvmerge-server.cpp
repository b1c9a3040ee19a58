#include "kvmerge-server.h"

#include "common.h"
#include "mtmd.h"
#include "server-common.h"

#include <algorithm>
#include <mutex>
#include <sstream>
#include <vector>

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
    kvmerge_program program;
    llama_context * ctx = nullptr;

    std::mutex mutex; // of the figures
    figures    now;
};

} // namespace

static server_state state;

//
// start
//

bool kvmerge_server_begin(common_params & params) {
    state.ctx = nullptr;

    return state.program.begin(params);
}

bool kvmerge_server_attach(llama_context * ctx) {
    if (!state.program.attach(ctx)) {
        return false;
    }

    state.ctx             = ctx;
    state.now             = {};
    state.now.n_cells_max = state.program.n_cells_max;

    return true;
}

int32_t kvmerge_server_n_batch(int32_t n_batch) {
    return state.program.n_batch(n_batch);
}

bool kvmerge_server_can_shift() {
    return !state.program.engine;
}

//
// prompts
//

int32_t kvmerge_server_reuse(int32_t id_slot, const server_tokens & tokens, int32_t n_past) {
    if (!state.program.engine || n_past == 0) {
        return n_past;
    }

    auto * mem    = llama_get_memory(state.ctx);
    auto * engine = state.program.engine;

    const int32_t n_tokens  = kvmerge_n_tokens(engine, id_slot);
    const bool    is_merged = kvmerge_n_cells(engine, id_slot) < n_tokens;

    if (llama_memory_seq_rm(mem, id_slot, tokens.pos_next(n_past), -1)) {
        if (is_merged && kvmerge_n_cells(engine, id_slot) == kvmerge_n_tokens(engine, id_slot)) {
            SRV_INF("slot %d: it goes on after %d of %d tokens, the last before what was merged: the rest is read again\n", id_slot, n_past, n_tokens);
        }
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
    if (!state.program.engine) {
        return 0;
    }

    if (state.program.flags.params.select == KVMERGE_SELECT_MEDIA && last_user_pos > 0) {
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

kvmerge_server_media::kvmerge_server_media(const mtmd_input_chunk * chunk) : kvmerge_media_scope(state.program.engine, chunk) {}

void kvmerge_server_idle(int32_t id_slot, bool is_idle) {
    if (state.program.engine) {
        kvmerge_set_idle(state.program.engine, id_slot, is_idle);
    }
}

bool kvmerge_server_was_cleared(int32_t id_slot) {
    if (!state.program.engine || !kvmerge_was_cleared(state.program.engine, id_slot)) {
        return false;
    }

    SRV_WRN("slot %d: a merge broke off, and its cells are gone (%s): what it held is read again\n", id_slot, kvmerge_error_message());

    return true;
}

void kvmerge_server_decoded() {
    if (!state.program.engine) {
        return;
    }

    kvmerge_stats stats;
    kvmerge_get_stats(state.program.engine, &stats);

    std::lock_guard<std::mutex> lock(state.mutex);

    // as many as there are slots; a slot that was restored brings the number of its own past, and no merge
    const int32_t n_new = stats.n_merges - state.now.n_merges;

    state.now.n_merges = stats.n_merges;

    for (int32_t n_back = std::min(n_new, 64) - 1; n_back >= 0; --n_back) {
        state.now.t_merges_us += state.program.tell(n_back);
    }
}

static kvmerge_contents contents_of(const server_tokens & tokens) {
    kvmerge_contents res;

    for (size_t i = 0; i < tokens.size();) {
        if (tokens[i] != LLAMA_TOKEN_NULL) {
            res.n_text++;
            i++;
            continue;
        }

        const auto * chunk = tokens.find_chunk(i).get();

        res.add_media(chunk);
        i += mtmd_input_chunk_get_n_tokens(chunk);
    }

    return res;
}

bool kvmerge_server_merge(int32_t id_slot, const server_tokens & tokens) {
    if (!state.program.engine) {
        return true;
    }

    const int32_t n_kept = contents_of(tokens).n_kept(state.program.flags);

    if (kvmerge_n_cells(state.program.engine, id_slot) <= n_kept) {
        return true;
    }

    const int32_t status = kvmerge_merge(state.program.engine, id_slot, n_kept);

    if (status == KVMERGE_ERROR_CLEARED) {
        kvmerge_was_cleared(state.program.engine, id_slot); // it is told here
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
    if (!state.program.engine) {
        return;
    }

    kvmerge_stats stats;
    kvmerge_get_stats(state.program.engine, &stats);

    std::vector<slot_figures> slots(n_slots);
    int32_t n_cells = 0;

    for (int32_t s = 0; s < n_slots; ++s) {
        int64_t sum = 0;
        for (int32_t l = 0; l < stats.n_layers; ++l) {
            sum += kvmerge_layer_cells(state.program.engine, s, l);
        }

        slots[s].n_tokens = kvmerge_n_tokens(state.program.engine, s);
        slots[s].n_cells  = (sum + stats.n_layers/2)/stats.n_layers;
        slots[s].n_bytes  = sum*stats.bytes_per_cell/stats.n_layers;

        n_cells += slots[s].n_cells;
    }

    std::lock_guard<std::mutex> lock(state.mutex);

    state.now.slots   = std::move(slots);
    state.now.n_cells = n_cells;
    state.now.n_bytes = kvmerge_bytes(state.program.engine);
}

json kvmerge_server_props() {
    if (!state.program.flags.is_on()) {
        return nullptr;
    }

    std::lock_guard<std::mutex> lock(state.mutex);

    int32_t n_tokens = 0;
    for (const auto & slot : state.now.slots) {
        n_tokens += slot.n_tokens;
    }

    return {
        { "policy",           state.program.flags.policy },
        { "budget",           state.program.flags.budget },
        { "max_cells",        state.now.n_cells_max > 0 ? json(state.now.n_cells_max) : json(nullptr) },
        { "keep_last_images", state.program.flags.n_whole },
        { "tokens",           n_tokens },
        { "cells",            state.now.n_cells },
        { "bytes",            state.now.n_bytes },
        { "merges",           state.now.n_merges },
    };
}

json kvmerge_server_slot(int32_t id_slot) {
    if (!state.program.flags.is_on()) {
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
    if (!state.program.flags.is_on()) {
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

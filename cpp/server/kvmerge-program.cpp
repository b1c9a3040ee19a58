#include "kvmerge-program.h"

#include "common.h"
#include "log.h"

#include <algorithm>
#include <stdexcept>

static constexpr double MIB = 1024.0*1024.0;

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

bool kvmerge_program::begin(common_params & params) {
    engine      = nullptr;
    n_cells_max = 0;

    try {
        flags = kvmerge_read_flags(params);
    } catch (const std::invalid_argument & e) {
        LOG_ERR("kvmerge: %s\n", e.what());
        return false;
    }

    if (!flags.is_on()) {
        return true;
    }

    const std::string why = conflict(params);
    if (!why.empty()) {
        LOG_ERR("kvmerge: --kv-merge %s does not go with this: %s\n", flags.policy.c_str(), why.c_str());
        return false;
    }

    params.kv_unified = true; // the sequences share the cells

    kvmerge_begin_small(std::max(params.n_ubatch, 256));

    return true;
}

bool kvmerge_program::attach(llama_context * ctx) {
    kvmerge_begin_small(0);

    if (!flags.is_on()) {
        return true;
    }

    const auto failed = [&]() {
        LOG_ERR("kvmerge: --kv-merge %s: %s\n", flags.policy.c_str(), kvmerge_error_message());
        return false;
    };

    kvmerge_engine * made = nullptr;
    if (kvmerge_attach(ctx, &flags.params, &made) != KVMERGE_OK) {
        return failed();
    }

    int64_t n_max = flags.n_cells_max;

    if (flags.n_bytes_max > 0) {
        n_max = std::min<int64_t>(flags.n_bytes_max*kvmerge_size(made)/kvmerge_bytes(made), INT32_MAX);

        if (n_max < 512) {
            LOG_ERR("kvmerge: --kv-max-cells: %.1f MiB are %d cells of this model and cache type, at least 512 are needed\n",
                    flags.n_bytes_max/MIB, (int) n_max);
            return false;
        }
    }

    if (kvmerge_set_room(made, n_max, flags.share, flags.n_whole) != KVMERGE_OK) {
        return failed();
    }
    kvmerge_keep_plans(made, false);

    engine      = made;
    n_cells_max = n_max;

    LOG_INF("kvmerge: merging with %s, --kv-budget %s (kept), %s\n", flags.policy.c_str(), flags.budget.c_str(),
            n_cells_max > 0 ? string_format("at most %d cells", n_cells_max).c_str() : "no --kv-max-cells");

    return true;
}

int32_t kvmerge_program::n_batch(int32_t n_batch) const {
    return n_cells_max > 0 ? std::min(n_batch, n_cells_max/4) : n_batch;
}

int64_t kvmerge_program::tell(int32_t n_back) const {
    kvmerge_stats stats;

    if (kvmerge_get_merge(engine, n_back, &stats) != KVMERGE_OK) {
        return 0;
    }

    LOG_INF("kvmerge: merged %d cells into %d (%d tokens, text: %d into %d), %.2f MiB into %.2f MiB, %.1f ms\n",
            stats.n_cells_before, (int) (stats.bytes_after/stats.bytes_per_cell), stats.n_tokens, stats.n_text_before, stats.n_text_after,
            stats.n_cells_before*stats.bytes_per_cell/MIB, stats.bytes_after/MIB, stats.t_total_us/1000.0);

    return stats.t_total_us;
}

kvmerge_media_scope::kvmerge_media_scope(kvmerge_engine * engine, const mtmd_input_chunk * chunk) : engine(engine) {
    if (engine) {
        kvmerge_media_begin(engine, mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_AUDIO ? KVMERGE_AUDIO : KVMERGE_IMAGE);
    }
}

kvmerge_media_scope::~kvmerge_media_scope() {
    if (engine) {
        kvmerge_media_end(engine);
    }
}

void kvmerge_contents::add_media(const mtmd_input_chunk * chunk) {
    const int32_t n = mtmd_input_chunk_get_n_tokens(chunk);

    if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_IMAGE) {
        images.push_back(n);
    }
    n_media += n;
    n_spans++;
}

int32_t kvmerge_contents::n_kept(const kvmerge_flags & flags) const {
    int32_t n_whole = 0; // tokens of the pictures that are left as they are
    for (size_t i = images.size() - std::min<size_t>(images.size(), flags.n_whole); i < images.size(); ++i) {
        n_whole += images[i];
    }

    return flags.n_kept(n_text, n_media - n_whole, n_spans, n_whole);
}

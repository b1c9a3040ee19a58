// Tokens that are read: what is noted of each, and which medium it is of.

#include "kvmerge-engine.h"
#include "kvmerge-error.h"
#include "kvmerge-room.h"

#include "llama-batch.h"
#include "llama-context.h"

#include <algorithm>
#include <cmath>
#include <utility>

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
        upload_bias();
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
        upload_bias();
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

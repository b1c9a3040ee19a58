// A merge that the caller asks for, and the update of the memory in which it runs.

#include "kvmerge-engine.h"
#include "kvmerge-error.h"
#include "kvmerge-room.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <iterator>
#include <utility>

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

kvmerge_status kvmerge_engine::merge(llama_seq_id seq_id, const std::vector<int32_t> & n_cells, float tolerance) {
    if (seq_id < 0 || (size_t) seq_id >= sequences.size()) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "seq_id is %d, accepted is 0 to %zu", seq_id, sequences.size() - 1);
    }
    if (n_cells.empty()) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "no number of cells to merge to, accepted is one and more");
    }
    for (size_t i = 0; i < n_cells.size(); ++i) {
        if (n_cells[i] < 1) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_cells is %d, accepted is 1 and more", n_cells[i]);
        }
        if (i > 0 && n_cells[i] <= n_cells[i - 1]) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "n_cells has %d after %d, accepted is a larger one", n_cells[i], n_cells[i - 1]);
        }
    }
    if (!(tolerance >= 0)) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "tolerance is %g, accepted is 0 and more", tolerance);
    }

    const auto cells = sequence_cells(seq_id);

    merge_goal goal;
    goal.tolerance = tolerance;
    std::copy_if(n_cells.begin(), n_cells.end(), std::back_inserter(goal.n_cells), [&](int32_t n) { return (size_t) n < cells.size(); });

    if (goal.n_cells.empty()) {
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

    pending.seq_id = seq_id;
    pending.goal   = std::move(goal);

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
        if (!pending.goal.n_cells.empty()) {
            pending.has_run = true;
            pending.status  = run(pending.seq_id, pending.goal, n_cells_max());
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

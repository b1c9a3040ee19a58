// One merge: score, allocate, plan, fold, commit.
//
// Until the fold nothing of the cache changes, and all memory that the rest takes is had before: so a merge is done, or has
// not begun, or, where the device fails in between, the sequence goes.

#include "kvmerge-allocate.h"
#include "kvmerge-compact.h"
#include "kvmerge-engine.h"
#include "kvmerge-error.h"
#include "kvmerge-fold.h"
#include "kvmerge-match.h"
#include "kvmerge-measure.h"
#include "kvmerge-mosaic.h"
#include "kvmerge-parallel.h"
#include "kvmerge-pool.h"
#include "kvmerge-runs.h"
#include "kvmerge-score.h"
#include "kvmerge-select.h"
#include "kvmerge-weigh.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <optional>
#include <utility>

// layers whose error is measured: spread evenly, as all of them would cost as much as the rest of some merges
static constexpr size_t N_MEASURED = 8;

static bool is_measured(size_t l, size_t n_layers) {
    return l*N_MEASURED % n_layers < N_MEASURED;
}

// the steps, and what they hand on
class kvmerge_engine::merge_steps {
public:
    merge_steps(kvmerge_engine & engine, llama_seq_id seq_id, const std::vector<uint32_t> & cells, int32_t n_cells, int32_t n_most) :
        engine(engine), params(engine.params), seq_id(seq_id), cells(cells), n_cells(n_cells), n_most(n_most),
        n_text(engine.n_text_kept(n_cells, cells, seq_id)), held_out(kvmerge_held_out(engine, seq_id, engine.n_seen(seq_id))), graph(engine.lctx),
        plans(engine.layers.size()), flows(engine.layers.size()), budgets(engine.layers.size()), logits(engine.n_head_kv_max()),
        compaction(engine) {}

    // what becomes of every cell, in every layer and head
    kvmerge_status plan();

    // the memory that the rest takes
    kvmerge_status reserve();

    // K and V of the pivots become those of their groups
    kvmerge_status fold();

    // the cells are those of the pivots; takes no memory
    void commit() noexcept;

    // how far what attention returns is moved, as the mean over the measured layers; -1: it could not be measured
    float error() const { return held_out.empty() ? -1 : error_sum/std::min(N_MEASURED, n_layers()); }

    int32_t n_after = 0; // cells of the layer that keeps most
    int64_t t_score = 0; // us

private:
    kvmerge_status look (size_t l); // what the layer holds
    kvmerge_status ask  ();         // the caller's planner, about all layers
    kvmerge_status score(size_t l);
    kvmerge_status match(size_t l); // and select

    void allocate();

    bool choose_targets (size_t l);
    bool find_similarity(size_t l);
    bool weigh          (size_t l);
    bool measure        (size_t l);

    // the next layer writes over the logits of the one before
    void take_logits(size_t l);

    size_t n_layers() const { return engine.layers.size(); }

    kvmerge_engine       & engine;
    const kvmerge_params & params;

    const llama_seq_id seq_id;

    const std::vector<uint32_t> & cells; // of the sequence, in the order of their tokens

    const int32_t n_cells; // to be left, as the mean over the layers
    const int32_t n_most;  // that no layer exceeds
    const int32_t n_text;  // of text that stay in every layer

    const std::vector<int32_t> held_out; // slots of the queries that the error is measured on

    double error_sum = 0;

    kvmerge_graph graph;

    std::vector<std::vector<kvmerge_plan>> plans;   // [layer][head]
    std::vector<kvmerge_flow>              flows;   // [layer]
    std::vector<int32_t>                   budgets; // [layer]
    std::vector<std::vector<float>>        logits;  // [head]

    kvmerge_engine::compaction compaction;
};

//
// plan
//

kvmerge_status kvmerge_engine::merge_steps::plan() {
    // One layer after the other where the sizes do not depend on the scores: the logits of all layers would be a lot.
    const bool by_score = !engine.planner && kvmerge_allocates_by_score(params);

    if (engine.planner) {
        if (const auto status = ask()) {
            return status;
        }
    } else if (!by_score) {
        allocate();
    }

    for (size_t l = 0; l < n_layers(); ++l) {
        if (const auto status = score(l)) {
            return status;
        }
        if (by_score) {
            continue;
        }
        if (const auto status = match(l)) {
            return status;
        }
    }

    if (by_score) {
        allocate();

        for (size_t l = 0; l < n_layers(); ++l) {
            if (const auto status = match(l)) {
                return status;
            }
        }
    }

    return KVMERGE_OK;
}

kvmerge_status kvmerge_engine::merge_steps::look(size_t l) {
    const auto & layer = engine.layers[l];

    plans[l].resize(layer.n_head_kv);

    const bool ok = kvmerge_parallel(graph, layer.n_head_kv, [&](int h) {
        plans[l][h].cells.reserve(cells.size());

        for (uint32_t idx : cells) {
            plans[l][h].cells.push_back(engine.cell(idx, l, h));
        }
    });

    if (!ok) {
        return kvmerge_error(KVMERGE_ERROR_COMPUTE, "the backend failed in layer %d", layer.il);
    }

    engine.mark_whole(n_cells, n_text, plans[l]);

    return KVMERGE_OK;
}

kvmerge_status kvmerge_engine::merge_steps::ask() {
    for (size_t l = 0; l < n_layers(); ++l) {
        if (const auto status = look(l)) {
            return status;
        }
    }

    return engine.planner.fill(seq_id, n_cells, n_most, params, plans);
}

kvmerge_status kvmerge_engine::merge_steps::score(size_t l) {
    const int64_t t_start = ggml_time_us();

    const auto & layer = engine.layers[l];

    if (!engine.planner) {
        if (const auto status = look(l)) {
            return status;
        }
    }

    for (size_t h = 0; h < plans[l].size(); ++h) {
        plans[l][h].logits = std::move(logits[h]);
    }

    if (params.score == KVMERGE_SCORE_POSITION) {
        for (auto & plan : plans[l]) {
            for (const auto & cur : plan.cells) {
                plan.score.push_back(cur.order);
            }
        }
    } else if (!kvmerge_score_layer(graph, engine, layer, seq_id, engine.n_seen(seq_id), cells, plans[l], flows[l])) {
        return kvmerge_error(KVMERGE_ERROR_COMPUTE, "the backend failed to score layer %d", layer.il);
    }

    if (params.score == KVMERGE_SCORE_ALL) {
        engine.load_sums(l, cells, plans[l]);
    }

    for (auto & plan : plans[l]) {
        kvmerge_pool(plan, params);
    }

    if (!kvmerge_needs_logits(params)) {
        take_logits(l);
    }

    t_score += ggml_time_us() - t_start;

    return KVMERGE_OK;
}

void kvmerge_engine::merge_steps::allocate() {
    budgets = engine.layer_budgets(plans, flows, cells, n_cells, n_text, n_most);
}

kvmerge_status kvmerge_engine::merge_steps::match(size_t l) {
    if (!choose_targets(l) || !find_similarity(l) || !weigh(l) || !measure(l)) {
        return kvmerge_error(KVMERGE_ERROR_COMPUTE, "the backend failed to match layer %d", engine.layers[l].il);
    }

    for (auto & plan : plans[l]) {
        n_after = std::max(n_after, plan.n_kept());

        // what the fold has no use for
        for (auto * values : { &plan.similarity, &plan.value_norm }) {
            values->clear();
            values->shrink_to_fit();
        }
    }
    take_logits(l);

    return KVMERGE_OK;
}

bool kvmerge_engine::merge_steps::choose_targets(size_t l) {
    const auto & layer = engine.layers[l];

    bool ok = true;

    if (engine.planner) {
        // the caller has chosen them
    } else if (params.select == KVMERGE_SELECT_MOSAIC || params.select == KVMERGE_SELECT_MEDIA) {
        ok = kvmerge_mosaic_layer(graph, engine, layer, cells, plans[l], budgets[l], n_text);
    } else if (params.select == KVMERGE_SELECT_RUNS) {
        ok = kvmerge_runs_layer(graph, engine, layer, cells, plans[l], budgets[l]);
    } else {
        ok = kvmerge_parallel(graph, plans[l].size(), [&](int h) { kvmerge_select(plans[l][h], budgets[l], params); });
        ok = ok && kvmerge_match_layer(graph, engine, layer, flows[l], cells, plans[l]);
    }

    return ok && graph.run();
}

bool kvmerge_engine::merge_steps::find_similarity(size_t l) {
    const bool is_needed = params.similarity > -1.0f || params.n_member > 0 ||
        params.fold == KVMERGE_FOLD_WEIGHTED || params.fold == KVMERGE_FOLD_EXP || params.fold == KVMERGE_FOLD_GAUSSIAN;

    return !is_needed || (kvmerge_similarity_layer(graph, engine.layers[l], cells, plans[l]) && graph.run());
}

bool kvmerge_engine::merge_steps::weigh(size_t l) {
    return kvmerge_parallel(graph, plans[l].size(), [&](int h) {
        auto & plan = plans[l][h];

        if (params.match == KVMERGE_MATCH_NONE && !engine.planner) {
            kvmerge_unfold(plan); // the control of a selection that groups
        }

        kvmerge_limit   (plan, params);
        kvmerge_weigh   (plan, params);
        kvmerge_fit_bias(plan, params);
    });
}

bool kvmerge_engine::merge_steps::measure(size_t l) {
    if (held_out.empty() || !is_measured(l, n_layers())) {
        return true;
    }

    kvmerge_error_sums sums;

    if (!kvmerge_measure_layer(graph, engine, engine.layers[l], held_out, cells, plans[l], sums)) {
        return false;
    }
    error_sum += sums.whole > 0 ? std::sqrt(sums.moved/sums.whole) : 0;

    return true;
}

void kvmerge_engine::merge_steps::take_logits(size_t l) {
    for (size_t h = 0; h < plans[l].size(); ++h) {
        logits[h] = plans[l][h].take_logits();
    }
}

//
// fold and commit
//

kvmerge_status kvmerge_engine::merge_steps::reserve() {
    logits = {};

    for (size_t l = 0; l < n_layers(); ++l) {
        kvmerge_fold_layer(graph, engine, engine.layers[l], cells, plans[l], n_after, &kvmerge_graph::reserve);

        if (!graph.reserve()) {
            return kvmerge_error(KVMERGE_ERROR_MEMORY, "not enough memory to fold layer %d", engine.layers[l].il);
        }
    }

    compaction.prepare(seq_id, cells, n_after, plans);

    return KVMERGE_OK;
}

kvmerge_status kvmerge_engine::merge_steps::fold() {
    for (size_t l = 0; l < n_layers(); ++l) {
        if (!kvmerge_fold_layer(graph, engine, engine.layers[l], cells, plans[l], n_after) || !graph.run()) {
            return kvmerge_error(KVMERGE_ERROR_COMPUTE, "the backend failed to fold layer %d", engine.layers[l].il);
        }
    }

    return KVMERGE_OK;
}

void kvmerge_engine::merge_steps::commit() noexcept {
    compaction.commit();

    // what only the fold needed goes, what tells of the merge stays
    for (auto & layer_plans : plans) {
        for (auto & plan : layer_plans) {
            plan.weight = {};
            plan.bias   = {};
        }
    }

    engine.plans = std::move(plans);
    engine.flows = std::move(flows);
}

//
// the merge
//

kvmerge_status kvmerge_engine::run(llama_seq_id seq_id, const merge_goal & goal, int32_t n_most) {
    lctx->synchronize();

    const auto cells = sequence_cells(seq_id);

    merge_progress progress = NOT_BEGUN;

    kvmerge_status status;
    try {
        status = merge_cells(seq_id, cells, goal, n_most, progress);
    } catch (const std::exception & e) {
        const bool is_memory = dynamic_cast<const std::bad_alloc *>(&e);

        status = kvmerge_error(is_memory ? KVMERGE_ERROR_MEMORY : KVMERGE_ERROR_COMPUTE, "the merge failed: %s", is_memory ? "not enough memory" : e.what());
    }

    if (progress == DONE) {
        return KVMERGE_OK; // at most its message in the log is missing
    }
    if (progress == CHANGING) {
        clear(seq_id, cells);

        return kvmerge_error(KVMERGE_ERROR_CLEARED, "%s failed while the cache changed: sequence %d was cleared",
                status == KVMERGE_ERROR_MEMORY ? "an allocation" : "the backend", seq_id);
    }

    shrink(); // back to what the layers stored before

    return status;
}

kvmerge_status kvmerge_engine::merge_cells(
        llama_seq_id seq_id, const std::vector<uint32_t> & cells, const merge_goal & goal, int32_t n_most, merge_progress & progress) {
    const int64_t t_start = ggml_time_us();

    if (!store_all()) {
        return kvmerge_error(KVMERGE_ERROR_MEMORY, "not enough memory to merge");
    }

    std::optional<merge_steps> steps;

    for (int32_t n_cells : goal.n_cells) {
        steps.emplace(*this, seq_id, cells, n_cells, n_most);

        if (const auto status = steps->plan()) {
            return status;
        }
        if (goal.allows(steps->error())) {
            break;
        }
        steps.reset();
    }
    if (!steps) {
        LLAMA_LOG_INFO("%s: sequence %d: no merge stays within an error of %g, nothing was merged\n", __func__, seq_id, goal.tolerance);

        return KVMERGE_OK;
    }

    const int64_t t_planned = ggml_time_us();

    if (const auto status = steps->reserve()) {
        return status;
    }

    progress = CHANGING;

    if (const auto status = steps->fold()) {
        return status;
    }

    steps->commit();

    progress = DONE;

    shrink();

    const int64_t t_end = ggml_time_us();

    stats.n_cells_before = cells.size();
    stats.n_cells_after  = steps->n_after;
    stats.error          = steps->error();
    stats.t_score_us     = steps->t_score;
    stats.t_match_us     = t_planned - t_start - steps->t_score;
    stats.t_fold_us      = t_end     - t_planned;
    stats.t_total_us     = t_end     - t_start;

    note_merge(seq_id);

    return KVMERGE_OK;
}

void kvmerge_engine::clear(llama_seq_id seq_id, const std::vector<uint32_t> & cells) noexcept {
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
    was_cleared[seq_id] = 1;

    bias_is_stale    = has_bias;
    cache.v_heads[0] = 0; // what is read next goes where there is room again

    forget(seq_id);
    plans.clear();

    lctx->get_memory()->seq_rm(seq_id, -1, -1); // what other parts of the memory hold of it

    shrink();

    version++;

    LLAMA_LOG_ERROR("%s: sequence %d is gone\n", __func__, seq_id);
}

//
// figures
//

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

void kvmerge_engine::note_merge(llama_seq_id seq_id) {
    stats.n_merges++;
    count_text(stats.n_text_before, stats.n_text_after);
    stats.n_tokens    = sequences[seq_id].n_seen;
    stats.bytes_after = 0;

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

    recent[stats.n_merges % MAX_RECENT] = stats;
    n_recent++;

    LLAMA_LOG_INFO("%s: sequence %d: %d tokens, %d positions, %d -> %d cells in %.1f ms\n", __func__, seq_id,
            stats.n_tokens, cache.seq_pos_max(seq_id) + 1, stats.n_cells_before, stats.n_cells_after, stats.t_total_us/1000.0);
}

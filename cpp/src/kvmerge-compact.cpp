#include "kvmerge-compact.h"

#include "kvmerge-fault.h"
#include "kvmerge-select.h"

#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

// What the cells of a layer and head hold then, [n_after]. A layer that keeps fewer cells than the others keeps them at the
// end: nothing is seen in front of them.
static std::vector<kvmerge_cell> cells_held(const kvmerge_plan & plan, int32_t n_after) {
    const auto kept = plan.kept();

    std::vector<float> mass(plan.cells.size());
    for (size_t i = 0; i < plan.cells.size(); ++i) {
        if (plan.target[i] >= 0) {
            mass[plan.target[i]] += plan.cells[i].mass;
        }
    }

    const int32_t offset = n_after - kept.size();

    std::vector<kvmerge_cell> res(n_after);

    for (int32_t c = 0; c < offset; ++c) {
        res[c].mass = 0;
        res[c].bias = -INFINITY;
    }
    for (size_t c = 0; c < kept.size(); ++c) {
        auto & cur = res[offset + c];

        cur      = plan.cells[kept[c]];
        cur.mass = mass[kept[c]];
        cur.bias = plan.bias[c];
    }

    return res;
}

static const kvmerge_plan & find_widest(const std::vector<std::vector<kvmerge_plan>> & plans) {
    const kvmerge_plan * res = &plans[0][0];

    for (const auto & layer_plans : plans) {
        for (const auto & plan : layer_plans) {
            res = plan.n_kept() > res->n_kept() ? &plan : res;
        }
    }

    return *res;
}

void kvmerge_engine::compaction::prepare(
        llama_seq_id seq_id_merged, const std::vector<uint32_t> & cells, int32_t n_after, const std::vector<std::vector<kvmerge_plan>> & plans) {
    kvmerge_may_fail();

    seq_id = seq_id_merged;
    first.assign(cells.begin(), cells.begin() + n_after);

    prepare_cells(cells, n_after, plans);
    prepare_table(seq_id, cells, n_after, find_widest(plans));
}

void kvmerge_engine::compaction::prepare_cells(const std::vector<uint32_t> & cells, int32_t n_after, const std::vector<std::vector<kvmerge_plan>> & plans) {
    const size_t n_merged = *std::max_element(first.begin(), first.end()) + 1;

    has_bias = engine.has_bias;

    held.resize(plans.size());
    sums.resize(plans.size());

    for (size_t l = 0; l < plans.size(); ++l) {
        for (size_t h = 0; h < plans[l].size(); ++h) {
            kvmerge_may_fail();

            held[l].push_back(cells_held(plans[l][h], n_after));

            has_bias = has_bias || std::any_of(held[l][h].begin(), held[l][h].end(), [](const auto & cell) { return cell.bias != 0.0f; });

            // larger already: what it tells of cells that are not merged is not looked at
            auto & head = engine.merged[l][h];
            head.resize(std::max(head.size(), n_merged));
        }
        if (engine.layers[l].sum) {
            sums[l] = engine.compact_sums(l, cells, n_after, plans[l]);
        }
        engine.reserve_bias(l, bias);
    }
}

// The table of cells is shared by all layers and heads. A merged cell takes position and order from the pivot of the widest
// plan: only their sequence matters, all of it lies in the past of the tokens to come.
// The last n_keep tokens are the same everywhere, so that they can still be removed one by one.
void kvmerge_engine::compaction::prepare_table(llama_seq_id seq_id, const std::vector<uint32_t> & cells, int32_t n_after, const kvmerge_plan & widest) {
    kvmerge_may_fail();

    const auto & before = engine.cache.get_cells(0);

    table     = before;
    tokens    = engine.tokens;
    is_merged = engine.is_merged;

    for (uint32_t idx : cells) {
        table.rm(idx);
        tokens   [idx] = {};
        is_merged[idx] = 0;
    }

    std::vector<llama_pos> pos;
    for (int32_t i : widest.kept()) {
        pos.push_back(before.pos_get(cells[i]));
    }

    // What is read next follows on the last token, and a batch of another sequence may come between: so the last cell stands
    // where that token did, also where the token went into another cell.
    const llama_pos pos_last = before.pos_get(cells.back());

    pos_merged = pos.back() < pos_last ? pos_last + 1 : pos[std::max(0, n_after - std::min(kvmerge_n_keep(engine.params), n_after))];
    pos.back() = pos_last;

    const auto kept = widest.kept();

    for (int32_t c = 0; c < n_after; ++c) {
        table.pos_set(cells[c], pos[c]);
        table.ext_set(cells[c], before.ext_get(cells[kept[c]]));
        table.seq_add(cells[c], seq_id);

        tokens   [cells[c]] = engine.tokens[cells[kept[c]]];
        is_merged[cells[c]] = 1;
    }
}

void kvmerge_engine::compaction::commit() noexcept {
    static_assert(std::is_nothrow_move_assignable_v<llama_kv_cells>);

    engine.cache.v_cells[0] = std::move(table);
    engine.cache.v_heads[0] = engine.cache.v_cells[0].used_max_p1();

    engine.tokens   .swap(tokens);
    engine.is_merged.swap(is_merged);

    engine.sequences[seq_id].pos_merged = pos_merged;

    for (size_t l = 0; l < held.size(); ++l) {
        for (size_t h = 0; h < held[l].size(); ++h) {
            for (size_t c = 0; c < first.size(); ++c) {
                engine.merged[l][h][first[c]] = held[l][h][c];
            }
        }
        if (!sums[l].empty()) {
            ggml_backend_tensor_set(engine.layers[l].sum, sums[l].data(), 0, ggml_nbytes(engine.layers[l].sum));
        }
    }

    if (has_bias) {
        engine.has_bias    = true;
        engine.is_per_head = true;

        for (size_t l = 0; l < held.size(); ++l) {
            engine.upload_bias(l, bias);
        }
    }

    engine.version++;
}

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

// How many cells at the beginning no layer and head touches: each of them holds its own token, and stays where it is.
static int32_t n_untouched(const std::vector<std::vector<kvmerge_plan>> & plans, int32_t n_after) {
    int32_t res = n_after;

    for (const auto & layer_plans : plans) {
        for (const auto & plan : layer_plans) {
            if (plan.n_kept() < n_after) {
                return 0; // its cells lie at the end
            }

            int32_t n = 0;
            while (n < res && plan.is_kept(n) && plan.cells[n].order == n && plan.cells[n].mass == 1) {
                n++;
            }

            for (size_t i = 0; i < plan.target.size(); ++i) {
                n = plan.is_folded(i) ? std::min(n, plan.target[i]) : n;
            }
            res = n;
        }
    }

    return res;
}

// How many of the last n cells, at most, no layer and head touches: each of them holds its own token, and the one after it the next.
// n_seen: tokens of the sequence
static int32_t n_untouched_last(const std::vector<std::vector<kvmerge_plan>> & plans, int32_t n, int32_t n_seen) {
    for (const auto & layer_plans : plans) {
        for (const auto & plan : layer_plans) {
            const int32_t n_cells = plan.cells.size();

            int32_t n_here = 0;
            while (n_here < n) {
                const int32_t i = n_cells - 1 - n_here;

                if (!plan.is_kept(i) || plan.cells[i].order != n_seen - 1 - n_here || plan.cells[i].mass != 1) {
                    break;
                }
                n_here++;
            }

            for (int32_t i = 0; i < n_cells; ++i) {
                n_here = plan.is_folded(i) ? std::min(n_here, n_cells - 1 - plan.target[i]) : n_here;
            }
            n = n_here;
        }
    }

    return n;
}

void kvmerge_engine::compaction::prepare(
        llama_seq_id seq_id_merged, const std::vector<uint32_t> & cells, int32_t n_after, const std::vector<std::vector<kvmerge_plan>> & plans) {
    kvmerge_may_fail();

    seq_id = seq_id_merged;
    first.assign(cells.begin(), cells.begin() + n_after);

    prepare_cells(cells, n_after, plans);
    prepare_table(seq_id, cells, n_after, plans);
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
void kvmerge_engine::compaction::prepare_table(llama_seq_id seq_id, const std::vector<uint32_t> & cells, int32_t n_after, const std::vector<std::vector<kvmerge_plan>> & plans) {
    kvmerge_may_fail();

    const auto & widest = find_widest(plans);

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

    // The last tokens can still be removed one by one, where nothing was done to them.
    const int32_t n_last = n_untouched_last(plans, std::min(kvmerge_n_keep(engine.params), n_after), engine.sequences[seq_id].n_seen);

    // What is read next follows on the last token that is left, and a batch of another sequence may come between: so the last
    // cell that is merged stands where the last of those tokens did, also where that token went into another cell. The first one
    // stays: it says where the sequence begins.
    const int32_t n_merged = n_after - n_last;

    if (n_merged > 1 || n_last == 0) {
        pos[n_merged - 1] = before.pos_get(cells[cells.size() - n_last - 1]);
    }

    pos_merged = n_last > 0 ? pos[n_merged] : pos.back() + 1;

    // Where text is merged too, what was read then has a say in how it would be merged anew: such a sequence is read from its start.
    const int32_t n_whole = engine.params.select == KVMERGE_SELECT_MEDIA ? n_untouched(plans, n_after) : 0;

    pos_whole = n_whole > 0 ? before.pos_get(cells[n_whole - 1]) + 1 : 0;

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
    engine.sequences[seq_id].pos_whole  = pos_whole;

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

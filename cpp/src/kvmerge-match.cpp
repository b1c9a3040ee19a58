#include "kvmerge-match.h"

#include "kvmerge-select.h"

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>

// scratch for the similarities of one piece of the graph
static constexpr int64_t MAX_ELEMENTS = 4*1024*1024;

// evicted cells and the pivots open to them, as indices into the plan
struct match_group {
    std::vector<int32_t> evicted;
    std::vector<int32_t> pivots;
};

static std::vector<match_group> make_groups(const kvmerge_plan & plan, int32_t match) {
    std::map<int32_t, match_group> groups;

    for (size_t i = 0; i < plan.cells.size(); ++i) {
        const auto & cell = plan.cells[i];

        const int32_t key =
            match == KVMERGE_MATCH_MODALITY ? cell.modality :
            match == KVMERGE_MATCH_SEGMENT  ? cell.segment  : 0;

        if (plan.fate[i] == KVMERGE_DROPPED && cell.mass > 0) {
            groups[key].evicted.push_back(i);
        } else if (plan.fate[i] == KVMERGE_KEPT) {
            groups[key].pivots.push_back(i);
        }
    }

    std::vector<match_group> res;
    for (auto & [key, group] : groups) {
        if (!group.evicted.empty() && !group.pivots.empty()) {
            res.push_back(std::move(group));
        }
    }

    return res;
}

// keys of the given cells (indices into the plan) with norm 1: F32 [n_embd_head_k, n]
static ggml_tensor * build_unit_keys(
        kvmerge_graph & graph, const kvmerge_layer & layer, int32_t head,
        const std::vector<uint32_t> & cells, const std::vector<int32_t> & index) {
    std::vector<int32_t> rows;
    for (int32_t i : index) {
        rows.push_back((int32_t) cells[i]*layer.n_head_kv + head);
    }

    ggml_context * ctx = graph.ctx();

    ggml_tensor * k = ggml_reshape_2d(ctx, layer.k, layer.n_embd_head_k, layer.k->ne[1]*layer.n_head_kv);
    k = ggml_get_rows(ctx, k, graph.input(GGML_TYPE_I32, { (int64_t) rows.size() }, rows.data()));

    return ggml_l2_norm(ctx, k, 1e-12f);
}

// cosines of keys a[i] and b[i], one graph node for all
static void build_similarity(
        kvmerge_graph & graph, const kvmerge_layer & layer, int32_t head, const std::vector<uint32_t> & cells,
        const std::vector<int32_t> & a, const std::vector<int32_t> & b, std::function<void(const float *)> read) {
    ggml_context * ctx = graph.ctx();

    ggml_tensor * product = ggml_mul(ctx, build_unit_keys(graph, layer, head, cells, a), build_unit_keys(graph, layer, head, cells, b));

    graph.output(ggml_sum_rows(ctx, product), [read](const std::vector<uint8_t> & bytes) {
        read(reinterpret_cast<const float *>(bytes.data()));
    });
}

bool kvmerge_match_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const kvmerge_flow          & flow,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans) {
    int32_t match = engine.params.match;

    if (match == KVMERGE_MATCH_FLOW) {
        match = flow.rho >= engine.params.theta ? KVMERGE_MATCH_ANY : KVMERGE_MATCH_MODALITY;
    }

    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        auto & plan = plans[h];

        plan.target.assign(plan.cells.size(), -1);
        for (int32_t i : plan.kept) {
            plan.target[i] = i;
        }

        if (match == KVMERGE_MATCH_NONE) {
            continue;
        }

        for (const auto & group : make_groups(plan, match)) {
            const size_t step = std::max<int64_t>(1, MAX_ELEMENTS/(int64_t) group.pivots.size());

            for (size_t i0 = 0; i0 < group.evicted.size(); i0 += step) {
                if (graph.is_full() && !graph.run()) {
                    return false;
                }

                const std::vector<int32_t> evicted(
                        group.evicted.begin() + i0, group.evicted.begin() + std::min(i0 + step, group.evicted.size()));

                ggml_tensor * pivots     = build_unit_keys(graph, layer, h, cells, group.pivots);
                ggml_tensor * similarity = ggml_mul_mat(graph.ctx(), pivots, build_unit_keys(graph, layer, h, cells, evicted));
                ggml_prec_set_acc(similarity, GGML_PREC_F32);                        // [n_pivots, n_evicted]

                graph.output(ggml_argmax(graph.ctx(), similarity), [&plan, evicted, pivots = group.pivots](const std::vector<uint8_t> & bytes) {
                    const int32_t * nearest = reinterpret_cast<const int32_t *>(bytes.data());

                    for (size_t i = 0; i < evicted.size(); ++i) {
                        plan.target[evicted[i]] = pivots[nearest[i]];
                        plan.fate  [evicted[i]] = KVMERGE_FOLDED;
                    }
                });
            }
        }
    }

    return true;
}

bool kvmerge_similarity_layer(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans) {
    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        auto & plan = plans[h];

        std::vector<int32_t> member;
        std::vector<int32_t> pivot;

        for (size_t i = 0; i < plan.cells.size(); ++i) {
            if (plan.fate[i] == KVMERGE_FOLDED) {
                member.push_back(i);
                pivot.push_back(plan.target[i]);
            }
        }

        plan.similarity.assign(plan.cells.size(), 1.0f);

        if (member.empty()) {
            continue;
        }
        if (graph.is_full() && !graph.run()) {
            return false;
        }

        build_similarity(graph, layer, h, cells, member, pivot, [&plan, member](const float * cosine) {
            for (size_t i = 0; i < member.size(); ++i) {
                plan.similarity[member[i]] = cosine[i];
            }
        });
    }

    return true;
}

// runs: the most similar neighbours of a segment join until n_groups are left; a run's highest score is its pivot
static void make_runs(kvmerge_plan & plan, const std::vector<int32_t> & index, const float * cosine, int32_t n_groups) {
    const int32_t n = index.size();

    // joins[i]: index[i] and index[i + 1] belong together
    std::vector<int32_t> order;
    for (int32_t i = 0; i + 1 < n; ++i) {
        if (plan.cells[index[i]].segment == plan.cells[index[i + 1]].segment && index[i + 1] == index[i] + 1) {
            order.push_back(i);
        }
    }
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return cosine[a] > cosine[b]; });

    std::vector<uint8_t> joins(n);
    for (int32_t i = 0; i < std::min<int32_t>(order.size(), std::max(0, n - n_groups)); ++i) {
        joins[order[i]] = 1;
    }

    std::vector<int32_t> pivots; // of the runs, in order
    std::vector<std::pair<int32_t, int32_t>> runs;

    for (int32_t first = 0; first < n; ) {
        int32_t last = first;
        while (last + 1 < n && joins[last]) {
            last++;
        }

        int32_t best = first;
        for (int32_t i = first; i <= last; ++i) {
            if (plan.score[index[i]] > plan.score[index[best]]) {
                best = i;
            }
        }

        runs.emplace_back(first, last);
        pivots.push_back(best);
        first = last + 1;
    }

    // segments that cannot join enough: the least important runs are dropped
    std::vector<int32_t> rank(runs.size());
    std::iota(rank.begin(), rank.end(), 0);
    std::stable_sort(rank.begin(), rank.end(), [&](int32_t a, int32_t b) { return plan.score[index[pivots[a]]] > plan.score[index[pivots[b]]]; });

    for (int32_t r = 0; r < std::min<int32_t>(n_groups, rank.size()); ++r) {
        const int32_t pivot = index[pivots[rank[r]]];

        for (int32_t i = runs[rank[r]].first; i <= runs[rank[r]].second; ++i) {
            plan.target[index[i]] = pivot;
            plan.fate  [index[i]] = index[i] == pivot ? KVMERGE_KEPT : KVMERGE_FOLDED;
        }
    }
}

bool kvmerge_runs_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans,
              int32_t                 n_cells) {
    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        auto & plan = plans[h];

        const int32_t n_free = n_cells - kvmerge_select_forced(plan, n_cells, engine.params);

        // heavy hitters are exempt: half of the cells
        const auto ranking = kvmerge_select_ranking(plan);
        for (int32_t i = 0; i < std::min<int32_t>(n_free/2, ranking.size()); ++i) {
            plan.fate[ranking[i]] = KVMERGE_PROTECTED;
        }

        const int32_t n_groups = n_free - n_free/2;

        std::vector<int32_t> index;
        plan.target.assign(plan.cells.size(), -1);

        for (size_t i = 0; i < plan.cells.size(); ++i) {
            if (plan.fate[i] != KVMERGE_DROPPED) {
                plan.target[i] = i;
            } else if (plan.cells[i].mass > 0) {
                index.push_back(i);
            }
        }

        if (index.empty() || n_groups == 0) {
            continue;
        }
        if (graph.is_full() && !graph.run()) {
            return false;
        }

        std::vector<int32_t> next(index.begin() + 1, index.end());
        next.push_back(index.back());

        build_similarity(graph, layer, h, cells, index, next, [&plan, index, n_groups](const float * cosine) {
            make_runs(plan, index, cosine, n_groups);
        });
    }

    return true;
}

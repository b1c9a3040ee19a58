#include "kvmerge-runs.h"

#include "kvmerge-keys.h"
#include "kvmerge-select.h"

#include <algorithm>
#include <numeric>

// the most similar neighbours of a segment join until n_groups are left; a run's highest score is its pivot
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
            plan.fold(index[i], pivot);
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
        auto free = kvmerge_select_free(plan);
        kvmerge_select_best(plan, free, n_free/2);
        for (int32_t i = 0; i < std::min<int32_t>(n_free/2, free.size()); ++i) {
            plan.protect(free[i]);
        }

        const int32_t n_groups = n_free - n_free/2;

        const auto index = kvmerge_select_free(plan);

        if (index.empty() || n_groups == 0) {
            continue;
        }
        if (graph.is_full() && !graph.run()) {
            return false;
        }

        std::vector<int32_t> next(index.begin() + 1, index.end());
        next.push_back(index.back());

        kvmerge_build_similarity(graph, layer, h, cells, index, next, [&plan, index, n_groups](const float * cosine) {
            make_runs(plan, index, cosine, n_groups);
        });
    }

    return true;
}

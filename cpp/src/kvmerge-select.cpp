#include "kvmerge-select.h"

#include <algorithm>
#include <cmath>
#include <numeric>

void kvmerge_select(kvmerge_plan & plan, int32_t n_cells, const kvmerge_params & params) {
    const int32_t n = plan.cells.size();

    const int32_t n_window = std::min(params.n_window, n_cells);
    const int32_t n_sink   = std::min(params.n_sink,   n_cells - n_window);

    plan.fate.assign(n, KVMERGE_DROPPED);

    std::fill(plan.fate.end() - n_window, plan.fate.end(),             KVMERGE_PROTECTED);
    std::fill(plan.fate.begin(),          plan.fate.begin() + n_sink,  KVMERGE_KEPT);

    // the rest by score
    std::vector<int32_t> rest(n - n_window - n_sink);
    std::iota(rest.begin(), rest.end(), n_sink);

    std::stable_sort(rest.begin(), rest.end(), [&](int32_t a, int32_t b) { return plan.score[a] > plan.score[b]; });

    for (int32_t i = 0; i < n_cells - n_window - n_sink; ++i) {
        plan.fate[rest[i]] = KVMERGE_KEPT;
    }

    plan.kept.clear();
    for (int32_t i = 0; i < n; ++i) {
        if (plan.fate[i] != KVMERGE_DROPPED) {
            plan.kept.push_back(i);
        }
    }

    // the most sensitive pivots receive nothing (FlowMM eq. 10): those above the tau-quantile of the pivots' importance
    std::vector<float> scores;
    for (int32_t i : plan.kept) {
        scores.push_back(plan.score[i]);
    }
    std::sort(scores.begin(), scores.end());

    const int32_t rank = std::max(0, (int32_t) std::ceil(params.tau*scores.size()) - 1);

    for (int32_t i : plan.kept) {
        if (plan.score[i] > scores[rank]) {
            plan.fate[i] = KVMERGE_PROTECTED;
        }
    }
}

#include "kvmerge-select.h"

#include <algorithm>
#include <cmath>
#include <numeric>

int32_t kvmerge_select_forced(kvmerge_plan & plan, int32_t n_cells, const kvmerge_params & params) {
    const int32_t n = plan.cells.size();

    plan.fate.assign(n, KVMERGE_DROPPED);

    const int32_t n_keep = kvmerge_n_keep(params);
    const int32_t n_last = std::min(std::max(n_keep, (int32_t) (params.recent*n_cells)), n_cells);

    int32_t n_forced = 0;

    for (int32_t i = n - 1; i >= 0 && n_forced < n_last; --i) {
        if (plan.cells[i].mass > 0) {
            // recent tokens beyond those are ordinary pivots
            plan.fate[i] = n_forced < n_keep ? KVMERGE_PROTECTED : KVMERGE_KEPT;
            n_forced++;
        }
    }

    for (int32_t i = 0; i < n && n_forced < n_cells; ++i) {
        if (plan.cells[i].is_whole && plan.cells[i].mass > 0 && plan.fate[i] == KVMERGE_DROPPED) {
            plan.fate[i] = KVMERGE_PROTECTED;
            n_forced++;
        }
    }

    int32_t n_sink = 0;

    for (int32_t i = 0; i < n && n_sink < params.n_sink && n_forced < n_cells; ++i) {
        if (plan.cells[i].mass > 0 && plan.fate[i] == KVMERGE_DROPPED) {
            plan.fate[i] = KVMERGE_KEPT;
            n_forced++;
            n_sink++;
        }
    }

    return n_forced;
}

std::vector<int32_t> kvmerge_select_ranking(const kvmerge_plan & plan) {
    std::vector<int32_t> res;

    for (size_t i = 0; i < plan.cells.size(); ++i) {
        if (plan.fate[i] == KVMERGE_DROPPED && plan.cells[i].mass > 0) {
            res.push_back(i);
        }
    }

    std::stable_sort(res.begin(), res.end(), [&](int32_t a, int32_t b) { return plan.score[a] > plan.score[b]; });

    return res;
}

void kvmerge_select_finish(kvmerge_plan & plan) {
    plan.kept.clear();

    for (size_t i = 0; i < plan.cells.size(); ++i) {
        if (plan.fate[i] == KVMERGE_KEPT || plan.fate[i] == KVMERGE_PROTECTED) {
            plan.kept.push_back(i);
        }
    }
}

// the most sensitive pivots receive nothing (FlowMM eq. 10): those above the tau-quantile of the pivots' importance
static void protect_sensitive(kvmerge_plan & plan, float tau) {
    std::vector<float> scores;
    for (int32_t i : plan.kept) {
        scores.push_back(plan.score[i]);
    }
    std::sort(scores.begin(), scores.end());

    const int32_t rank = std::max(0, (int32_t) std::ceil(tau*scores.size()) - 1);

    for (int32_t i : plan.kept) {
        if (plan.score[i] > scores[rank]) {
            plan.fate[i] = KVMERGE_PROTECTED;
        }
    }
}

// cells for text and for media, by the attention that each gets (MadaKV's modality preference)
static int32_t text_share(const kvmerge_plan & plan, const std::vector<int32_t> & ranking, int32_t n_free) {
    double  weight_text = 0;
    double  weight_all  = 0;
    int32_t n_text      = 0;

    for (int32_t i : ranking) {
        const bool is_text = plan.cells[i].modality == KVMERGE_TEXT;

        weight_all  += plan.score[i];
        weight_text += is_text ? plan.score[i] : 0.0f;
        n_text      += is_text;
    }

    const int32_t n_media = ranking.size() - n_text;

    int32_t share = weight_all > 0 ? (int32_t) std::lround(n_free*weight_text/weight_all) : n_free;

    // neither part can use more than it has
    share = std::max(share, n_free - n_media);

    return std::min(share, n_text);
}

void kvmerge_select(kvmerge_plan & plan, int32_t n_cells, const kvmerge_params & params) {
    const int32_t n_forced = kvmerge_select_forced(plan, n_cells, params);

    auto ranking = kvmerge_select_ranking(plan);

    const int32_t n_free = std::min<int32_t>(n_cells - n_forced, ranking.size());

    const auto is_text = [&](int32_t i) { return plan.cells[i].modality == KVMERGE_TEXT; };

    if (params.select == KVMERGE_SELECT_TEXT) {
        std::stable_partition(ranking.begin(), ranking.end(), is_text);
    }

    if (params.select == KVMERGE_SELECT_MODALITY) {
        // the best of each modality to the front
        int32_t n_text  = text_share(plan, ranking, n_free);
        int32_t n_media = n_free - n_text;

        std::stable_partition(ranking.begin(), ranking.end(), [&](int32_t i) { return (is_text(i) ? n_text : n_media)-- > 0; });
    }

    for (int32_t i = 0; i < n_free; ++i) {
        plan.fate[ranking[i]] = KVMERGE_KEPT;
    }

    kvmerge_select_finish(plan);

    protect_sensitive(plan, params.tau);
}

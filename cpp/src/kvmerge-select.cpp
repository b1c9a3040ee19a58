#include "kvmerge-select.h"

#include <algorithm>
#include <cmath>
#include <numeric>

int32_t kvmerge_select_forced(kvmerge_plan & plan, int32_t n_cells, const kvmerge_params & params) {
    const int32_t n = plan.cells.size();

    plan.drop_all();

    const int32_t n_keep = kvmerge_n_keep(params);
    const int32_t n_last = std::min(std::max(n_keep, (int32_t) (params.recent*n_cells)), n_cells);

    int32_t n_forced = 0;

    for (int32_t i = n - 1; i >= 0 && n_forced < n_last; --i) {
        if (plan.cells[i].mass > 0) {
            // recent tokens beyond those are ordinary pivots
            plan.keep(i);
            plan.is_protected[i] = n_forced < n_keep;
            n_forced++;
        }
    }

    for (int32_t i = 0; i < n && n_forced < n_cells; ++i) {
        if (plan.cells[i].is_whole && plan.is_left(i)) {
            plan.protect(i);
            n_forced++;
        }
    }

    int32_t n_sink = 0;

    for (int32_t i = 0; i < n && n_sink < params.n_sink && n_forced < n_cells; ++i) {
        if (plan.is_left(i)) {
            plan.keep(i);
            n_forced++;
            n_sink++;
        }
    }

    return n_forced;
}

std::vector<int32_t> kvmerge_select_free(const kvmerge_plan & plan) {
    std::vector<int32_t> res;

    for (size_t i = 0; i < plan.cells.size(); ++i) {
        if (plan.is_left(i)) {
            res.push_back(i);
        }
    }

    return res;
}

void kvmerge_select_best(const kvmerge_plan & plan, std::vector<int32_t> & cells, int32_t n) {
    std::nth_element(cells.begin(), cells.begin() + std::min<size_t>(n, cells.size()), cells.end(), [&](int32_t a, int32_t b) {
        return plan.score[a] > plan.score[b] || (plan.score[a] == plan.score[b] && a < b);
    });
}

// the most sensitive pivots receive nothing (FlowMM eq. 10): those above the tau-quantile of the pivots' importance
static void protect_sensitive(kvmerge_plan & plan, float tau) {
    const auto kept = plan.kept();

    std::vector<float> scores;
    for (int32_t i : kept) {
        scores.push_back(plan.score[i]);
    }

    const int32_t rank = std::max(0, (int32_t) std::ceil(tau*scores.size()) - 1);

    std::nth_element(scores.begin(), scores.begin() + rank, scores.end());

    for (int32_t i : kept) {
        if (plan.score[i] > scores[rank]) {
            plan.protect(i);
        }
    }
}

// cells for text, by the attention that it gets (MadaKV's modality preference)
static int32_t text_share(const kvmerge_plan & plan, const std::vector<int32_t> & text, const std::vector<int32_t> & media, int32_t n_free) {
    const auto weight = [&](const std::vector<int32_t> & cells) {
        double sum = 0;
        for (int32_t i : cells) {
            sum += plan.score[i];
        }
        return sum;
    };

    const double weight_text = weight(text);
    const double weight_all  = weight(media) + weight_text;

    int32_t share = weight_all > 0 ? (int32_t) std::lround(n_free*weight_text/weight_all) : n_free;

    // neither part can use more than it has
    share = std::max<int32_t>(share, n_free - media.size());

    return std::min<int32_t>(share, text.size());
}

void kvmerge_select(kvmerge_plan & plan, int32_t n_cells, const kvmerge_params & params) {
    const int32_t n_forced = kvmerge_select_forced(plan, n_cells, params);

    auto free = kvmerge_select_free(plan);

    const int32_t n_free = std::min<int32_t>(n_cells - n_forced, free.size());

    const auto keep_best = [&](std::vector<int32_t> & cells, int32_t n) {
        kvmerge_select_best(plan, cells, n);

        for (int32_t i = 0; i < n; ++i) {
            plan.keep(cells[i]);
        }
    };

    if (params.select == KVMERGE_SELECT_TOP) {
        keep_best(free, n_free);
    } else {
        const auto first_media = std::stable_partition(free.begin(), free.end(), [&](int32_t i) { return plan.cells[i].modality == KVMERGE_TEXT; });

        std::vector<int32_t> text (free.begin(), first_media);
        std::vector<int32_t> media(first_media, free.end());

        const int32_t n_text = params.select == KVMERGE_SELECT_TEXT ? std::min<int32_t>(n_free, text.size()) : text_share(plan, text, media, n_free);

        keep_best(text,  n_text);
        keep_best(media, n_free - n_text);
    }

    protect_sensitive(plan, params.tau);
}

#include "kvmerge-allocate.h"

#include "kvmerge-select.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

// whole numbers in [n_min, n_max] that add up to `total` and follow `want`
static std::vector<int32_t> round_to_total(std::vector<double> want, int64_t total, int32_t n_min, int32_t n_max) {
    const size_t n = want.size();

    // scale what is above the minimum until the clamped sum fits
    const auto clamped = [&](double scale, size_t l) { return std::min<double>(n_max, std::max<double>(n_min, scale*want[l])); };

    double low  = 0;
    double high = 1e6;
    for (int i = 0; i < 200; ++i) {
        const double mid = 0.5*(low + high);
        double sum = 0;
        for (size_t l = 0; l < n; ++l) {
            sum += clamped(mid, l);
        }
        (sum < total ? low : high) = mid;
    }

    std::vector<int32_t> res(n);
    std::vector<double>  rest(n);
    for (size_t l = 0; l < n; ++l) {
        res [l] = (int32_t) std::floor(clamped(low, l) + 1e-9);
        rest[l] = clamped(low, l) - res[l];
    }

    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return rest[a] > rest[b]; });

    int64_t left = total - std::accumulate(res.begin(), res.end(), (int64_t) 0);
    while (left > 0) {
        bool any = false;
        for (int32_t l : order) {
            if (left > 0 && res[l] < n_max) {
                res[l]++;
                left--;
                any = true;
            }
        }
        if (!any) {
            break;
        }
    }

    return res;
}

// fewest tokens of one modality that cover a share of its attention (MadaKV's k_m)
static int32_t n_to_cover(const kvmerge_plan & plan, bool text, float share) {
    std::vector<float> scores;
    double             sum = 0;

    for (size_t i = 0; i < plan.cells.size(); ++i) {
        if ((plan.cells[i].modality == KVMERGE_TEXT) == text && plan.cells[i].mass > 0) {
            scores.push_back(plan.score[i]);
            sum += plan.score[i];
        }
    }
    std::sort(scores.begin(), scores.end(), std::greater<float>());

    double  covered = 0;
    int32_t count   = 0;
    while (count < (int32_t) scores.size() && covered < share*sum) {
        covered += scores[count++];
    }

    return count;
}

bool kvmerge_allocates_by_score(const kvmerge_params & params) {
    return params.allocate == KVMERGE_ALLOCATE_COVER || params.allocate == KVMERGE_ALLOCATE_ENTROPY;
}

std::vector<int32_t> kvmerge_allocate(
        const std::vector<std::vector<kvmerge_plan>> & plans,
        const std::vector<kvmerge_flow>              & flows,
        int32_t n, int32_t n_cells, int32_t n_least, int32_t n_most, const kvmerge_params & params) {
    const int32_t n_layers = plans.size();
    const int32_t n_min    = std::min(n_cells, n_least);

    std::vector<double> want(n_layers, n_cells);

    switch (params.allocate) {
        case KVMERGE_ALLOCATE_UNIFORM:
            return std::vector<int32_t>(n_layers, n_cells);
        case KVMERGE_ALLOCATE_PYRAMID:
            // PyramidKV: from 2*mean - mean/20 at the first layer down to mean/20 at the last
            for (int32_t l = 0; l < n_layers; ++l) {
                const double min = n_cells/20.0;
                const double max = 2.0*n_cells - min;
                want[l] = n_layers > 1 ? max - (max - min)*l/(n_layers - 1) : n_cells;
            }
            break;
        case KVMERGE_ALLOCATE_EARLY:
            {
                // the first quarter of the layers gets twice the mean, the others share what is left
                const int32_t n_early = n_layers/4;
                for (int32_t l = 0; l < n_layers; ++l) {
                    want[l] = l < n_early ? 2.0*n_cells : n_cells*(double) (n_layers - 2*n_early)/(n_layers - n_early);
                }
            }
            break;
        case KVMERGE_ALLOCATE_COVER:
            {
                // MadaKV: what a layer needs beyond its budget is taken from the layers to come, what it needs less is given to them
                double budget = n_cells;
                for (int32_t l = 0; l < n_layers; ++l) {
                    double need = 0;
                    for (const auto & plan : plans[l]) {
                        need += n_to_cover(plan, true, params.cover) + n_to_cover(plan, false, params.cover);
                    }
                    need /= plans[l].size();

                    want[l] = budget;
                    budget  = std::max<double>(n_min, budget - (need - budget)/(n_layers - l));
                }
            }
            break;
        case KVMERGE_ALLOCATE_ENTROPY:
            {
                // MEDA: softmax over the layers of the entropy of the attention between modalities
                std::vector<double> entropy(n_layers);
                double max = -INFINITY;
                for (int32_t l = 0; l < n_layers; ++l) {
                    for (double p : { (double) flows[l].text_to_media, (double) flows[l].media_to_text }) {
                        entropy[l] += p > 0 ? -p*std::log(p) : 0;
                    }
                    max = std::max(max, entropy[l]);
                }
                for (int32_t l = 0; l < n_layers; ++l) {
                    want[l] = std::exp(entropy[l] - max);
                }
            }
            break;
    }

    return round_to_total(want, (int64_t) n_cells*n_layers, n_min, std::min(n, n_most));
}

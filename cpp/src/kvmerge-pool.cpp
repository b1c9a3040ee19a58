#include "kvmerge-pool.h"

#include <algorithm>
#include <cmath>

void kvmerge_pool(kvmerge_plan & plan, const kvmerge_params & params) {
    const int32_t n = plan.cells.size();

    if (params.value_norm) {
        for (int32_t i = 0; i < n; ++i) {
            plan.score[i] *= plan.value_norm[i];
        }
    }

    for (float & score : plan.score) {
        score = std::isfinite(score) ? score : 0.0f; // sorting is undefined with NaN
    }

    if (params.n_pool <= 1) {
        return;
    }

    std::vector<float> pooled(n);

    for (int32_t i = 0; i < n; ++i) {
        float   sum   = 0;
        float   best  = plan.score[i];
        int32_t count = 0;

        for (int32_t j = std::max(0, i - params.n_pool/2); j <= std::min(n - 1, i + params.n_pool/2); ++j) {
            if (plan.cells[j].segment != plan.cells[i].segment) {
                continue;
            }

            sum += plan.score[j];
            best = std::max(best, plan.score[j]);
            count++;
        }

        pooled[i] = params.pool_max ? best : sum/count;
    }

    plan.score = std::move(pooled);
}

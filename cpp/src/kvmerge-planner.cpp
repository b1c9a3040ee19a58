#include "kvmerge-planner.h"

#include "kvmerge-error.h"
#include "kvmerge-select.h"

#include <algorithm>

// one head's targets, checked and taken over
static kvmerge_status take(kvmerge_plan & plan, const int32_t * target, int32_t layer, int32_t head, int32_t n_keep) {
    const int32_t n = plan.cells.size();

    plan.drop_all();

    for (int32_t i = 0; i < n; ++i) {
        const int32_t t = target[i];

        if (t < -1 || t >= n) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "the plan of layer %d, head %d puts cell %d into %d: accepted is -1 (dropped) or 0 to %d",
                    layer, head, i, t, n - 1);
        }
        if (t < 0) {
            continue;
        }
        if (plan.cells[i].mass == 0 || plan.cells[t].mass == 0) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "the plan of layer %d, head %d puts cell %d into %d: an empty cell (mass 0) can only be dropped, and takes up nothing",
                    layer, head, i, t);
        }
        if (target[t] != t) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "the plan of layer %d, head %d puts cell %d into %d, which is not kept: the target of a kept cell is itself",
                    layer, head, i, t);
        }

        plan.fold(i, t);
    }

    // the last tokens can be removed one by one, so they hold themselves and nothing else
    int32_t n_left = n_keep;

    for (int32_t i = n - 1; i >= 0 && n_left > 0; --i) {
        if (plan.cells[i].mass == 0) {
            continue;
        }
        if (!plan.is_kept(i)) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "the plan of layer %d, head %d does not keep cell %d: the last %d are always kept",
                    layer, head, i, n_keep);
        }
        plan.protect(i);
        n_left--;
    }

    for (int32_t i = 0; i < n; ++i) {
        if (plan.is_folded(i) && plan.is_protected[target[i]]) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "the plan of layer %d, head %d puts cell %d into %d: the last %d take up nothing",
                    layer, head, i, target[i], n_keep);
        }
    }

    return KVMERGE_OK;
}

kvmerge_status kvmerge_planner::fill(
        int32_t seq_id, int32_t n_cells, int32_t n_most,
        const kvmerge_params                   & params,
        std::vector<std::vector<kvmerge_plan>> & plans) const {
    const size_t n = plans[0][0].cells.size();

    std::vector<int32_t> order;
    std::vector<int32_t> segment;
    std::vector<uint8_t> modality;
    std::vector<uint8_t> whole;
    std::vector<float>   mass;
    std::vector<int32_t> target;

    int32_t n_heads = 0;

    for (const auto & layer_plans : plans) {
        for (const auto & plan : layer_plans) {
            for (size_t i = 0; i < n; ++i) {
                const auto & cell = plan.cells[i];

                order   .push_back(cell.order);
                segment .push_back(cell.segment);
                modality.push_back(cell.modality);
                whole   .push_back(cell.is_whole);
                mass    .push_back(cell.mass);
                target  .push_back(cell.mass > 0 ? (int32_t) i : -1);
            }
            n_heads++;
        }
    }

    const kvmerge_question question = {
        /* .seq_id   = */ seq_id,
        /* .n_cells  = */ n_cells,
        /* .n_most   = */ n_most,
        /* .n        = */ (int32_t) n,
        /* .n_heads  = */ n_heads,
        /* .order    = */ order.data(),
        /* .segment  = */ segment.data(),
        /* .modality = */ modality.data(),
        /* .whole    = */ whole.data(),
        /* .mass     = */ mass.data(),
        /* .target   = */ target.data(),
    };

    if (ask(data, &question) != 0) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "the caller gave no plan");
    }

    // as the policy's own selection does where there is room for less
    const int32_t n_keep = std::min(kvmerge_n_keep(params), n_cells);

    int64_t n_total = 0; // of all layers
    size_t  row     = 0;

    for (size_t l = 0; l < plans.size(); ++l) {
        int32_t n_widest = 0;

        for (size_t h = 0; h < plans[l].size(); ++h, ++row) {
            if (const auto status = take(plans[l][h], target.data() + row*n, l, h, n_keep)) {
                return status;
            }
            n_widest = std::max(n_widest, plans[l][h].n_kept());
        }

        if (n_widest > n_most) {
            return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "the plan keeps %d cells in layer %zu: there is room for %d", n_widest, l, n_most);
        }
        n_total += n_widest;
    }

    if (n_total > (int64_t) n_cells*(int64_t) plans.size()) {
        return kvmerge_error(KVMERGE_ERROR_ARGUMENT, "the plan keeps %.1f cells as the mean over the layers: %d were asked for",
                (double) n_total/plans.size(), n_cells);
    }

    return KVMERGE_OK;
}

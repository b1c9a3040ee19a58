#pragma once

// A plan from the caller, in place of select and match: the engine asks, checks what it gets and goes on with the fold.

#include "kvmerge-plan.h"

#include <vector>

struct kvmerge_planner {
    kvmerge_planner_fn ask  = nullptr; // nullptr: the policy's select and match are used
    void             * data = nullptr;

    explicit operator bool() const { return ask != nullptr; }

    // Fills target and is_protected of plans[layer][head], whose cells are known.
    //   n_cells  cells to keep, as the mean over the layers
    //   n_most   cells that no layer exceeds
    kvmerge_status fill(
            int32_t seq_id, int32_t n_cells, int32_t n_most,
            const kvmerge_params                   & params,
            std::vector<std::vector<kvmerge_plan>> & plans) const;
};

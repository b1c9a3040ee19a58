#pragma once

// allocate: how many cells each layer keeps. Pure functions over plain arrays.

#include "kvmerge-plan.h"

// whether the cells of a layer depend on the scores of all layers
bool kvmerge_allocates_by_score(const kvmerge_params & params);

// Cells per layer, [layer], each in [n_least, min(n, n_most)], with a mean of n_cells as nearly as whole numbers allow.
//   plans  [layer][head], with scores where the allocation is by score
//   n      cells before the merge
std::vector<int32_t> kvmerge_allocate(
        const std::vector<std::vector<kvmerge_plan>> & plans,
        const std::vector<kvmerge_flow>              & flows,
        int32_t n, int32_t n_cells, int32_t n_least, int32_t n_most, const kvmerge_params & params);

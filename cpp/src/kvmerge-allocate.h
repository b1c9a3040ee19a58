#pragma once

// allocate: how many cells each layer keeps. Pure functions over plain arrays.

#include "kvmerge-plan.h"

// Cells per layer, [layer], each in [n_min, min(n, n_most)], with a mean of n_cells as nearly as whole numbers allow.
//   plans  [layer][head] with scores; n_min covers sinks and window
std::vector<int32_t> kvmerge_allocate(
        const std::vector<std::vector<kvmerge_plan>> & plans,
        const std::vector<kvmerge_flow>              & flows,
        int32_t n_cells, int32_t n_most, const kvmerge_params & params);

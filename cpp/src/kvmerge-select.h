#pragma once

// select: which cells survive, and which of them may receive folds. Pure functions over plain arrays.

#include "kvmerge-plan.h"

// Fills kept, and fate with KVMERGE_KEPT, KVMERGE_PROTECTED or KVMERGE_DROPPED.
//   n_cells  cells to keep, [1, n]
// The last min(n_window, n_cells) cells are kept and protected, then the first n_sink are kept, then the highest
// scores; ties go to the earlier cell.
void kvmerge_select(kvmerge_plan & plan, int32_t n_cells, const kvmerge_params & params);

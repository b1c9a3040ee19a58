#pragma once

// select: which cells survive, and which of them may receive folds. Pure functions over plain arrays.

#include "kvmerge-plan.h"

// Last tokens that are kept and receive nothing.
inline int32_t kvmerge_n_keep(const kvmerge_params & params) {
    return params.n_keep > 0 ? params.n_keep : params.n_window;
}

// The cells that are kept whatever the scores say: the last min(n_keep, n_cells) and whole pictures, protected, and the
// first n_sink.
// Returns how many.
int32_t kvmerge_select_forced(kvmerge_plan & plan, int32_t n_cells, const kvmerge_params & params);

// Indices of the cells that are neither forced nor empty.
std::vector<int32_t> kvmerge_select_free(const kvmerge_plan & plan);

// Brings the n highest scores among `cells` to the front, in any order; ties go to the earlier cell.
void kvmerge_select_best(const kvmerge_plan & plan, std::vector<int32_t> & cells, int32_t n);

// KVMERGE_SELECT_TOP, _TEXT and _MODALITY: what is kept, and what of it is protected.
//   n_cells  cells to keep, [1, n]
void kvmerge_select(kvmerge_plan & plan, int32_t n_cells, const kvmerge_params & params);

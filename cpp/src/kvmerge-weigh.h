#pragma once

// fold, first part: the weight of every cell in the mean of its group, and the bias of the pivot. Pure functions.

#include "kvmerge-plan.h"

// Drops everything that was folded.
void kvmerge_unfold(kvmerge_plan & plan);

// Drops what is not similar enough to its pivot, or too much for it (params.similarity, params.n_member);
// KVMERGE_FOLD_EXP raises the threshold to the running mean of the similarities (D2O).
void kvmerge_limit(kvmerge_plan & plan, const kvmerge_params & params);

// Fills weight.
void kvmerge_weigh(kvmerge_plan & plan, const kvmerge_params & params);

// Fills bias; KVMERGE_BIAS_FIT from plan.logits.
void kvmerge_fit_bias(kvmerge_plan & plan, const kvmerge_params & params);

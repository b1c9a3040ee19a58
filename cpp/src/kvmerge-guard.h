#pragma once

// guard: a head whose folds do more harm than good evicts instead.
//
// Half of the proxy queries fit the bias, the other half judge: their attention output over the merged cells and over
// the kept cells alone is compared with that over all cells.

#include "kvmerge-engine.h"

// Undoes the folds of the heads that are better off without; plans[head].logits and weight are set, bias is fitted anew.
// n_guarded grows by the number of those heads. false: the backend failed.
bool kvmerge_guard_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans,
              int32_t               & n_guarded);

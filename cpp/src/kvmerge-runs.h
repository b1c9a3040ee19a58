#pragma once

// select and match of KVMerger: runs of neighbours with similar keys become one cell. Half of the cells go to the highest
// scores as they are.

#include "kvmerge-engine.h"

// Fills fate and target of plans[head] of one layer.
// The graph is only built here (it may run in between when it gets large): results arrive when it runs.
// false: the backend failed.
bool kvmerge_runs_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans,
              int32_t                 n_cells);

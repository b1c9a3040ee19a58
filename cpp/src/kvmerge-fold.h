#pragma once

// fold: K and V of every pivot become the weighted mean of its group, and move to their new cell.

#include "kvmerge-engine.h"

// Cell c of the result is written to cells[c]. Weights are the masses, so that folding twice with one partition equals
// folding once. Every read of a head comes before its first write, so that the cache can be changed in place.
// false: the backend failed.
bool kvmerge_fold_layer(
              kvmerge_graph             & graph,
        const kvmerge_engine            & engine,
        const kvmerge_layer             & layer,
        const std::vector<uint32_t>     & cells,
        const std::vector<kvmerge_plan> & plans);

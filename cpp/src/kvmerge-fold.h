#pragma once

// fold: K and V of every pivot become the weighted mean of its group, and move to their new cell.

#include "kvmerge-engine.h"

// The B pivots of a head are written to cells[n_cells - B, n_cells), where n_cells is the largest B of all layers.
// Every read of a head comes before its first write, so that the cache can be changed in place.
// flush: what is done with a graph that is full; the last one is left to the caller.
// false: the backend failed.
bool kvmerge_fold_layer(
              kvmerge_graph             & graph,
        const kvmerge_engine            & engine,
        const kvmerge_layer             & layer,
        const std::vector<uint32_t>     & cells,
        const std::vector<kvmerge_plan> & plans,
              int32_t                     n_cells,
              bool (kvmerge_graph::*            flush)() = &kvmerge_graph::run);

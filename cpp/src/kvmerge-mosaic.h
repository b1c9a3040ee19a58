#pragma once

// select and match of the preset `mosaic`: every picture is kept as a mosaic of fewer, larger tiles that cover all of it.
//
// Choosing the survivors by importance alone loses what the question does not point at. Here part of a picture's cells
// goes to its most important tokens, which stay as they are; the rest of the picture is cut into groups of similar keys
// (farthest-point seeds, nearest seed), and every group becomes one cell. Text is treated more gently than pictures.

#include "kvmerge-engine.h"

// Fills fate, kept and target of plans[head]; no token is dropped unless the budget has no cell left for its segment.
// The graph (products of keys within a segment) is only built here: results arrive when it runs. false: the backend failed.
bool kvmerge_mosaic_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans,
              int32_t                 n_cells);

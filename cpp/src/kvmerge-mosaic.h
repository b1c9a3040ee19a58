#pragma once

// select and match of the preset `mosaic`: every picture is kept as a mosaic of fewer, larger tiles that cover all of it.
//
// Choosing the survivors by importance alone loses what the question does not point at. Here a picture is cut into groups
// of similar keys (farthest-point seeds, nearest seed), and every group becomes one cell, of its seed and, once
// kvmerge_limit has been there, the params.n_member most like it; a share of the cells (params.pivots) may go to the
// picture's most important tokens instead. Pictures have cells in proportion to their tokens; where text is left alone
// (KVMERGE_SELECT_MEDIA), the next group goes to the picture in which a token is farthest from its group. Text stays whole
// while it fits in its share; what does not fit is grouped across all of its runs.

#include "kvmerge-engine.h"

// Fills target and is_protected of plans[head]; what is dropped is text that does not fit and has no group.
// n_text: cells that text keeps as they are, of n_cells; KVMERGE_SELECT_MEDIA only
// The graph brings the keys of what is grouped, and runs. false: the backend failed.
bool kvmerge_mosaic_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans,
              int32_t                 n_cells,
              int32_t                 n_text);

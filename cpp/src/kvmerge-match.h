#pragma once

// match: the pivot that each evicted cell folds into, by cosine similarity of keys (FlowMM eq. 9).

#include "kvmerge-engine.h"

// Fills plans[head].target of the cells of one layer that are not kept and find a pivot.
// The graph has to be empty. false: the backend failed.
bool kvmerge_match_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const kvmerge_flow          & flow,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans);

// Fills plans[head].similarity: the cosine of every folded cell's key to its pivot's.
// The graph is only built here (it may run in between when it gets large): results arrive when it runs.
// false: the backend failed.
bool kvmerge_similarity_layer(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans);

#pragma once

// Attention of observed queries, on the CPU: what kvmerge-score.cpp builds as a graph for any backend, without storing a
// weight for every query and cell. Queries go side by side, KVMERGE_TILE at a time.

#include "kvmerge-engine.h"
#include "kvmerge-graph.h"
#include "kvmerge-plan.h"

#include <vector>

// can this layer's attention be computed by the functions below?
bool kvmerge_can_attend(const kvmerge_engine & engine, const kvmerge_layer & layer);

// Fills score and logits of all plans of a layer, and what queries give to each modality.
//   window  slots of the proxy queries, which see the cells up to their own token
//   text    slots of other queries of text, for the logits only
//   flow    slots of the queries that are asked what they give
//   given   [flow.size()][kvmerge_observer::n_modalities], summed over all heads; zero before
// The graph has to be empty. false: the backend failed.
bool kvmerge_attend(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<int32_t>  & window,
        const std::vector<int32_t>  & text,
        const std::vector<int32_t>  & flow,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans,
        std::vector<double>         & given);

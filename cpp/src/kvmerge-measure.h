#pragma once

// measure: how far a merge moves what attention returns, asked of queries that it was not fitted to.

#include "kvmerge-engine.h"

// over queries and query heads: squared length of what attention returns, and of what the merge changes of it
struct kvmerge_error_sums {
    double whole = 0;
    double moved = 0;
};

// Slots of observed queries of text that no bias is fitted to; none where too few were observed.
std::vector<int32_t> kvmerge_held_out(const kvmerge_engine & engine, llama_seq_id seq_id, int32_t n_seen);

// The sums of one layer, from plans with targets, weights and bias; nothing of the cache has changed yet. A query that came
// before a part of a group keeps that group as it was.
// The graph has to be empty. false: the backend failed.
bool kvmerge_measure_layer(
              kvmerge_graph             & graph,
        const kvmerge_engine            & engine,
        const kvmerge_layer             & layer,
        const std::vector<int32_t>      & slots,
        const std::vector<uint32_t>     & cells,
        const std::vector<kvmerge_plan> & plans,
              kvmerge_error_sums        & sums);

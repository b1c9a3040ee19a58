#pragma once

// score: importance of every cell, and the flow between modalities, from the observed queries.

#include "kvmerge-engine.h"

// Is anything measured on the logits of the queries, after the scores were made of them?
bool kvmerge_needs_logits(const kvmerge_params & params);

// slots of the sampled queries of text whose logits are measured beside those of the window
std::vector<int32_t> kvmerge_fitted_text(const kvmerge_engine & engine, llama_seq_id seq_id, int32_t n_seen);

// attention logits of the queries in `slots` over the cells, without bias and mask, for n_heads KV heads from `head` on:
// [n, rows, n_group*n_heads]
ggml_tensor * kvmerge_build_logits(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<int32_t>  & slots,
        const std::vector<uint32_t> & cells,
              int32_t                 head,
              int32_t                 n_heads);

// attention weights from such logits, with bias and mask: [n, rows, n_group, n_heads]
ggml_tensor * kvmerge_build_attention(
              kvmerge_graph             & graph,
        const kvmerge_engine            & engine,
        const kvmerge_layer             & layer,
              ggml_tensor               * kq,
        const std::vector<int32_t>      & slots,
        const std::vector<kvmerge_plan> & plans,
              int32_t                     head,
              int32_t                     n_heads);

// Fills plans[head].score of one layer, and its flow if the policy asks for it or plans are kept (else rho is -1). `cells`
// are those of the sequence, in order; plans[head].cells is set.
// The graph has to be empty. false: the backend failed.
bool kvmerge_score_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
              llama_seq_id            seq_id,
              int32_t                 n_seen,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans,
              kvmerge_flow          & flow);

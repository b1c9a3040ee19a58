#pragma once

// score, KVMERGE_SCORE_ALL: the attention that every cell got from all queries so far (H2O), added up while the prompt
// is read. Attention weights exist for one block of query rows at a time; this costs a second product of Q and K.

#include "llama-graph.h"

struct kvmerge_engine;
struct kvmerge_layer;

// query rows of a block
static constexpr int64_t KVMERGE_SUM_ROWS = 64;

// Adds what the ubatch's queries give to layer.sum.
void kvmerge_build_accumulate(
        const llm_graph_context & graph,
          const kvmerge_engine  & engine,
          const kvmerge_layer   & layer,
                  ggml_tensor   * q,       // [n_embd_head_k, n_head,    n_tokens]
                  ggml_tensor   * k,       // [n_embd_head_k, n_head_kv, n_kv]
                  ggml_tensor   * kq_mask, // [n_kv, n_tokens]
                        float     kq_scale);

#pragma once

// The hook in the model's graph: attention over a cache that observes its queries and whose cells may carry a bias.

#include "llama-graph.h"

struct kvmerge_engine;
struct kvmerge_layer;

// As llm_graph_context::build_attn_mha() (which it is when engine is nullptr). With an engine the chosen query rows
// are copied aside, and the bias of the merged cells is added to the mask.
ggml_tensor * kvmerge_build_attn(
        const llm_graph_context & graph,
               kvmerge_engine   * engine,
                  ggml_tensor   * q,       // [n_embd_head_k, n_head,    n_tokens]
                  ggml_tensor   * k,       // [n_embd_head_k, n_head_kv, n_kv, n_stream]; a layer may store fewer than n_kv
                  ggml_tensor   * v,       // [n_embd_head_v, n_head_kv, n_kv, n_stream], or transposed
                  ggml_tensor   * kq_b,
                  ggml_tensor   * kq_mask, // [n_kv, n_tokens, 1, n_stream]
                  ggml_tensor   * sinks,   // [n_head]
                  ggml_tensor   * v_mla,
                        float     kq_scale,
                          int     il);

// the last n along a dimension: of the cells, those that a layer stores
ggml_tensor * kvmerge_last(ggml_context * ctx, ggml_tensor * t, int dim, int64_t n);

// The mask with the bias of every head: [n_kv, n_tokens, n_head]. Large: for few tokens at a time.
ggml_tensor * kvmerge_build_mask_per_head(ggml_context * ctx, const kvmerge_layer & layer, ggml_tensor * kq_mask);

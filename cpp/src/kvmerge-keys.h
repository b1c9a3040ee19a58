#pragma once

// keys of chosen cells, and how similar they are.

#include "kvmerge-engine.h"

#include <functional>

// keys by their rows in the cache: F32 [n_embd_head_k, n]
ggml_tensor * kvmerge_build_key_rows(kvmerge_graph & graph, const kvmerge_layer & layer, const std::vector<int32_t> & rows);

int32_t kvmerge_key_row(const kvmerge_layer & layer, uint32_t cell, int32_t head);

// keys of one KV head at index[i] among the sequence's cells: F32 [n_embd_head_k, n]
ggml_tensor * kvmerge_build_keys(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
              int32_t                 head,
        const std::vector<uint32_t> & cells,
        const std::vector<int32_t>  & index);

// keys of n_heads KV heads from `head` on, all cells of the first, then all of the next: F32 [n_embd_head_k, n*n_heads]
ggml_tensor * kvmerge_build_keys(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
              int32_t                 head,
              int32_t                 n_heads,
        const std::vector<uint32_t> & cells);

// cosines of the keys a[i] and b[i], handed to `read` when the graph runs
void kvmerge_build_similarity(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
              int32_t                 head,
        const std::vector<uint32_t> & cells,
        const std::vector<int32_t>  & a,
        const std::vector<int32_t>  & b,
              std::function<void(const float *)> read);

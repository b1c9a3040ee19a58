#pragma once

// keys of chosen cells, and how similar they are.

#include "kvmerge-engine.h"

#include <functional>

// keys of one KV head at index[i] among the sequence's cells: F32 [n_embd_head_k, n]
ggml_tensor * kvmerge_build_keys(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
              int32_t                 head,
        const std::vector<uint32_t> & cells,
        const std::vector<int32_t>  & index);

// cosines of the keys a[i] and b[i], handed to `read` when the graph runs
void kvmerge_build_similarity(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
              int32_t                 head,
        const std::vector<uint32_t> & cells,
        const std::vector<int32_t>  & a,
        const std::vector<int32_t>  & b,
              std::function<void(const float *)> read);

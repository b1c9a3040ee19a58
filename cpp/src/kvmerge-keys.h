#pragma once

// keys of chosen cells, and how similar they are.

#include "kvmerge-engine.h"
#include "kvmerge-rows.h"

#include <functional>

// keys by their rows in the cache: F32 [n_embd_head_k, n]
ggml_tensor * kvmerge_build_key_rows(kvmerge_graph & graph, const kvmerge_layer & layer, const std::vector<int32_t> & rows);

inline int32_t kvmerge_key_row(const kvmerge_layer & layer, uint32_t cell, int32_t head) {
    return (int32_t) cell*layer.n_head_kv + head;
}

// keys of one KV head at index[i] among the sequence's cells: F32 [n_embd_head_k, n]
ggml_tensor * kvmerge_build_keys(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
              int32_t                 head,
        const std::vector<uint32_t> & cells,
        const std::vector<int32_t>  & index);

// keys of one KV head in the memory of the host, where kvmerge_read_row() finds them
struct kvmerge_keys_of_head {
    kvmerge_rows                  rows;
    const kvmerge_layer         & layer;
    const std::vector<uint32_t> & cells;
    int32_t                       head;

    kvmerge_keys_of_head(const kvmerge_layer & layer, const std::vector<uint32_t> & cells, int32_t head) :
        rows(layer.k, layer.n_embd_head_k), layer(layer), cells(cells), head(head) {}

    // of the i-th of the cells
    int32_t row(int32_t i) const { return kvmerge_key_row(layer, cells[i], head); }
};

// cosines of the keys a[i] and b[i], handed to `read` when the graph runs
void kvmerge_build_similarity(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
              int32_t                 head,
        const std::vector<uint32_t> & cells,
        const std::vector<int32_t>  & a,
        const std::vector<int32_t>  & b,
              std::function<void(const float *)> read);

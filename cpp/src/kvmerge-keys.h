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

// keys of n_heads KV heads from `head` on, F32, in any order of the cells; to be read with kvmerge_keys_of_head
ggml_tensor * kvmerge_build_keys_of_heads(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
              int32_t                 head,
              int32_t                 n_heads,
        const std::vector<uint32_t> & cells);

// They lie as [n/N_BLOCK, rounded up][n_heads][N_BLOCK][d]: for every block the heads follow each other, as in the cache, so
// that what is read is near to what was read before.
class kvmerge_keys_of_head {
public:
    static constexpr int64_t N_BLOCK = 16;

    kvmerge_keys_of_head(const float * keys, int32_t head, int32_t n_heads, int64_t d) :
        first(keys + head*N_BLOCK*d), block(n_heads*N_BLOCK*d), d(d) {}

    const float * operator[](int64_t i) const { return first + i/N_BLOCK*block + i%N_BLOCK*d; }

private:
    const float * first;
    int64_t       block;
    int64_t       d;
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

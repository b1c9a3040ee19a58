#pragma once

// sums: ggml has one for the values of a row, on a single thread. These are as fast as the machine, on every backend.

#include "kvmerge-graph.h"

// the values of each row of x, F32 [d, n]: F32 [n]
ggml_tensor * kvmerge_build_sum_values(kvmerge_graph & graph, ggml_tensor * x);

// the rows of each matrix of x, F32 [d, n, m], d contiguous: F32 [d, 1, m]
ggml_tensor * kvmerge_build_sum_rows(ggml_context * ctx, ggml_tensor * x);

//
// weighted sums of groups of rows
//

struct kvmerge_groups_of_rows {
    std::vector<int32_t> first;  // [n_groups + 1] group g has the rows first[g], ..., first[g + 1] - 1 of the arrays below
    std::vector<int32_t> row;
    std::vector<float>   weight;
};

// sums of some of the groups
struct kvmerge_sum {
    ggml_tensor *        sum;   // F32 [d, n]
    std::vector<int32_t> group; // [n]
};

// Sums of the rows of x [d, n], whose type may be any. All groups have to have rows. Fused, adding is one operation of the
// CPU: x has to lie in the host's memory.
std::vector<kvmerge_sum> kvmerge_build_sum_groups(kvmerge_graph & graph, ggml_tensor * x, const kvmerge_groups_of_rows & rows, bool fuse);

#include "kvmerge-keys.h"

#include "kvmerge-sums.h"

#include <algorithm>
#include <cmath>

ggml_tensor * kvmerge_build_key_rows(kvmerge_graph & graph, const kvmerge_layer & layer, const std::vector<int32_t> & rows) {
    ggml_context * ctx = graph.ctx();

    ggml_tensor * k = ggml_reshape_2d(ctx, layer.k, layer.n_embd_head_k, layer.k->ne[1]*layer.n_head_kv);

    return ggml_get_rows(ctx, k, graph.input(GGML_TYPE_I32, { (int64_t) rows.size() }, rows.data()));
}

ggml_tensor * kvmerge_build_keys(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
              int32_t                 head,
        const std::vector<uint32_t> & cells,
        const std::vector<int32_t>  & index) {
    std::vector<int32_t> rows;
    rows.reserve(index.size());
    for (int32_t i : index) {
        rows.push_back(kvmerge_key_row(layer, cells[i], head));
    }

    return kvmerge_build_key_rows(graph, layer, rows);
}

void kvmerge_build_similarity(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
              int32_t                 head,
        const std::vector<uint32_t> & cells,
        const std::vector<int32_t>  & a,
        const std::vector<int32_t>  & b,
              std::function<void(const float *)> read) {
    ggml_context * ctx = graph.ctx();

    ggml_tensor * k_a = kvmerge_build_keys(graph, layer, head, cells, a);
    ggml_tensor * k_b = kvmerge_build_keys(graph, layer, head, cells, b);

    const auto dot = [&](ggml_tensor * x, ggml_tensor * y) { return kvmerge_build_sum_values(graph, ggml_mul(ctx, x, y)); };

    ggml_tensor * norms  = ggml_sqrt(ctx, ggml_clamp(ctx, ggml_mul(ctx, dot(k_a, k_a), dot(k_b, k_b)), 1e-24f, INFINITY));
    ggml_tensor * cosine = ggml_div(ctx, dot(k_a, k_b), norms);                          // [n]

    graph.output(cosine, [read](const std::vector<uint8_t> & bytes) {
        read(reinterpret_cast<const float *>(bytes.data()));
    });
}

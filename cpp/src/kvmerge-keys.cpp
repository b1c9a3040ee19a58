#include "kvmerge-keys.h"

ggml_tensor * kvmerge_build_keys(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
              int32_t                 head,
        const std::vector<uint32_t> & cells,
        const std::vector<int32_t>  & index) {
    std::vector<int32_t> rows;
    rows.reserve(index.size());
    for (int32_t i : index) {
        rows.push_back((int32_t) cells[i]*layer.n_head_kv + head);
    }

    ggml_context * ctx = graph.ctx();

    ggml_tensor * k = ggml_reshape_2d(ctx, layer.k, layer.n_embd_head_k, layer.k->ne[1]*layer.n_head_kv);

    return ggml_get_rows(ctx, k, graph.input(GGML_TYPE_I32, { (int64_t) rows.size() }, rows.data()));
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

    ggml_tensor * unit_a = ggml_l2_norm(ctx, kvmerge_build_keys(graph, layer, head, cells, a), 1e-12f);
    ggml_tensor * unit_b = ggml_l2_norm(ctx, kvmerge_build_keys(graph, layer, head, cells, b), 1e-12f);

    ggml_tensor * cosine = ggml_sum_rows(ctx, ggml_mul(ctx, unit_a, unit_b));            // [1, n]

    graph.output(cosine, [read](const std::vector<uint8_t> & bytes) {
        read(reinterpret_cast<const float *>(bytes.data()));
    });
}

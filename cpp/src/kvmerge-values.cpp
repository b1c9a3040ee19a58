#include "kvmerge-values.h"

#include <algorithm>

ggml_tensor * kvmerge_build_values(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
              int32_t                 head) {
    ggml_context * ctx = graph.ctx();

    const int64_t d       = layer.n_embd_head_v;
    const int64_t kv_size = layer.v->ne[1];
    const int64_t n_heads = layer.v->ne[0]/d; // of a cell; some may be padding

    std::vector<int32_t> rows;
    ggml_tensor * v;

    if (engine.v_trans) {
        // memory is [kv_size, n_embd]
        const uint32_t n_used = *std::max_element(cells.begin(), cells.end()) + 1;
        const size_t   size   = ggml_type_size(layer.v->type);

        v = ggml_view_2d(ctx, layer.v, n_used, d, kv_size*size, head*d*kv_size*size);
        v = ggml_cont(ctx, ggml_transpose(ctx, v));                                      // [d, n_used]

        rows.assign(cells.begin(), cells.end());
    } else {
        v = ggml_reshape_2d(ctx, layer.v, d, n_heads*kv_size);

        for (uint32_t idx : cells) {
            rows.push_back((int32_t) (idx*n_heads + head));
        }
    }

    return ggml_get_rows(ctx, v, graph.input(GGML_TYPE_I32, { (int64_t) rows.size() }, rows.data()));
}

#include "kvmerge-accumulate.h"

#include "kvmerge-attn.h"
#include "kvmerge-engine.h"
#include "kvmerge-sums.h"

#include <algorithm>

void kvmerge_build_accumulate(
        const llm_graph_context & graph,
          const kvmerge_engine  & engine,
          const kvmerge_layer   & layer,
                  ggml_tensor   * q,
                  ggml_tensor   * k,
                  ggml_tensor   * kq_mask,
                        float     kq_scale) {
    ggml_context * ctx = graph.ctx0;

    const int64_t n_kv      = kq_mask->ne[0];
    const int64_t n_tokens  = q->ne[2];
    const int64_t n_group   = layer.n_head/layer.n_head_kv;

    q = ggml_permute(ctx, q, 0, 2, 1, 3);                                                // [d, n_tokens, n_head]
    k = ggml_permute(ctx, k, 0, 2, 1, 3);                                                // [d, n_kv, n_head_kv]

    for (int64_t i = 0; i < n_tokens; i += KVMERGE_SUM_ROWS) {
        const int64_t n_rows = std::min(KVMERGE_SUM_ROWS, n_tokens - i);

        ggml_tensor * rows = ggml_view_3d(ctx, q, q->ne[0], n_rows, q->ne[2], q->nb[1], q->nb[2], i*q->nb[1]);
        ggml_tensor * mask = ggml_view_2d(ctx, kq_mask, n_kv, n_rows, kq_mask->nb[1], i*kq_mask->nb[1]);

        if (engine.has_bias) {
            mask = kvmerge_build_mask_per_head(ctx, layer, mask);
        }

        ggml_tensor * kq = ggml_mul_mat(ctx, k, rows);                                   // [n_kv, n_rows, n_head]
        ggml_prec_set_acc(kq, GGML_PREC_F32);

        float scale = kq_scale;

        if (engine.logit_softcap > 0.0f) {
            kq = ggml_scale(ctx, kq, kq_scale/engine.logit_softcap);
            kq = ggml_tanh (ctx, kq);
            kq = ggml_scale(ctx, kq, engine.logit_softcap);

            scale = 1.0f;
        }

        kq = ggml_soft_max_ext(ctx, kq, mask, scale, 0.0f);
        if (layer.sinks) {
            ggml_soft_max_add_sinks(kq, layer.sinks);
        }

        kq = ggml_reshape_3d(ctx, kq, n_kv, n_rows*n_group, layer.n_head_kv);
        kq = ggml_reshape_2d(ctx, kvmerge_build_sum_rows(ctx, kq), n_kv, layer.n_head_kv); // [n_kv, n_head_kv]

        ggml_tensor * sum = ggml_view_2d(ctx, layer.sum, n_kv, layer.n_head_kv, layer.sum->nb[1], 0);

        ggml_build_forward_expand(graph.gf, ggml_cpy(ctx, ggml_add(ctx, kq, sum), sum));
    }
}

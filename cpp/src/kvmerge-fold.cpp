#include "kvmerge-fold.h"

#include "kvmerge-host.h"
#include "kvmerge-groups.h"
#include "kvmerge-sums.h"

#include <algorithm>

// one KV head of K or V
static void build_fold(
        kvmerge_graph & graph, ggml_tensor * cache, int64_t d, int32_t head, bool trans, const std::vector<uint32_t> & cells,
        const kvmerge_plan & plan, const kvmerge_groups & groups, bool move, int32_t n_cells) {
    ggml_context * ctx = graph.ctx();

    const int64_t kv_size = cache->ne[1];
    const int64_t n_heads = cache->ne[0]/d; // of a cell; some may be padding

    ggml_tensor * flat;
    if (trans) {
        // memory is [kv_size, n_embd]: bring the head's part into [d, kv_size]
        const uint32_t n_used = *std::max_element(cells.begin(), cells.end()) + 1;

        const size_t type_size = ggml_type_size(cache->type);

        flat = ggml_view_2d(ctx, cache, n_used, d, kv_size*type_size, head*d*kv_size*type_size);
        flat = ggml_cont(ctx, ggml_transpose(ctx, flat));                                // [d, n_used]
    } else {
        flat = ggml_reshape_2d(ctx, cache, d, kv_size*n_heads);                          // [d, n_heads*kv_size]
    }

    const auto row = [&](uint32_t idx) { return trans ? (int32_t) idx : (int32_t) (idx*n_heads + head); };

    kvmerge_groups_of_rows rows;

    if (move) {
        rows.first = groups.first;
        for (int32_t i : groups.index) {
            rows.row   .push_back(row(cells[i]));
            rows.weight.push_back(plan.weight[i]);
        }
    } else {
        rows.first.push_back(0);
        for (int32_t i : groups.pivot) {
            rows.row   .push_back(row(cells[i]));
            rows.weight.push_back(1.0f);
            rows.first .push_back(rows.row.size());
        }
    }

    const auto sums = kvmerge_build_sum_groups(graph, flat, rows, kvmerge_is_host(cache));

    // all sums before the first store
    for (const auto & cur : sums) {
        graph.store(cur.sum);
    }

    // a layer that keeps fewer cells than the others keeps them at the end
    const int32_t offset = n_cells - groups.pivot.size();

    for (const auto & cur : sums) {
        std::vector<int64_t> dst;

        if (trans) {
            for (int32_t g : cur.group) {
                for (int64_t e = 0; e < d; ++e) {
                    dst.push_back((head*d + e)*kv_size + cells[offset + g]);
                }
            }

            ggml_tensor * values = ggml_reshape_2d(ctx, cache, 1, ggml_nelements(cache));
            ggml_tensor * sum    = ggml_reshape_2d(ctx, cur.sum, 1, dst.size());

            graph.store(ggml_set_rows(ctx, values, sum, graph.input(GGML_TYPE_I64, { (int64_t) dst.size() }, dst.data())));
        } else {
            for (int32_t g : cur.group) {
                dst.push_back(row(cells[offset + g]));
            }

            graph.store(ggml_set_rows(ctx, flat, cur.sum, graph.input(GGML_TYPE_I64, { (int64_t) dst.size() }, dst.data())));
        }
    }
}

bool kvmerge_fold_layer(
              kvmerge_graph             & graph,
        const kvmerge_engine            & engine,
        const kvmerge_layer             & layer,
        const std::vector<uint32_t>     & cells,
        const std::vector<kvmerge_plan> & plans,
              int32_t                     n_cells,
              bool (kvmerge_graph::*            flush)()) {
    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        if (graph.is_full() && !(graph.*flush)()) {
            return false;
        }

        const auto groups = kvmerge_make_groups(plans[h]);

        build_fold(graph, layer.k, layer.n_embd_head_k, h, false,          cells, plans[h], groups, engine.params.move_keys, n_cells);
        build_fold(graph, layer.v, layer.n_embd_head_v, h, engine.v_trans, cells, plans[h], groups, true,                    n_cells);
    }

    return true;
}

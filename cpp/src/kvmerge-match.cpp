#include "kvmerge-match.h"

#include <map>

// scratch for the similarities of one piece of the graph
static constexpr int64_t MAX_ELEMENTS = 4*1024*1024;

// evicted cells and the pivots open to them, as indices into the plan
struct match_group {
    std::vector<int32_t> evicted;
    std::vector<int32_t> pivots;
};

static std::vector<match_group> make_groups(const kvmerge_plan & plan, int32_t match) {
    std::map<int32_t, match_group> groups;

    for (size_t i = 0; i < plan.cells.size(); ++i) {
        const auto & cell = plan.cells[i];

        const int32_t key =
            match == KVMERGE_MATCH_MODALITY ? cell.modality :
            match == KVMERGE_MATCH_SEGMENT  ? cell.segment  : 0;

        if (plan.fate[i] == KVMERGE_DROPPED) {
            groups[key].evicted.push_back(i);
        } else if (plan.fate[i] == KVMERGE_KEPT) {
            groups[key].pivots.push_back(i);
        }
    }

    std::vector<match_group> res;
    for (auto & [key, group] : groups) {
        if (!group.evicted.empty() && !group.pivots.empty()) {
            res.push_back(std::move(group));
        }
    }

    return res;
}

bool kvmerge_match_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const kvmerge_flow          & flow,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans) {
    int32_t match = engine.params.match;

    if (match == KVMERGE_MATCH_FLOW) {
        match = flow.rho >= engine.params.theta ? KVMERGE_MATCH_ANY : KVMERGE_MATCH_MODALITY;
    }

    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        auto & plan = plans[h];

        plan.target.assign(plan.cells.size(), -1);
        for (int32_t i : plan.kept) {
            plan.target[i] = i;
        }

        if (match == KVMERGE_MATCH_NONE) {
            continue;
        }

        const auto normalized_keys = [&](const int32_t * idx, size_t n) {
            std::vector<int32_t> rows(n);
            for (size_t i = 0; i < n; ++i) {
                rows[i] = (int32_t) cells[idx[i]]*layer.n_head_kv + h;
            }

            ggml_context * ctx = graph.ctx();

            ggml_tensor * k = ggml_reshape_2d(ctx, layer.k, layer.n_embd_head_k, layer.k->ne[1]*layer.n_head_kv);
            k = ggml_get_rows(ctx, k, graph.input(GGML_TYPE_I32, { (int64_t) n }, rows.data()));

            return ggml_l2_norm(ctx, k, 1e-12f);                                         // [n_embd_head_k, n]
        };

        for (const auto & group : make_groups(plan, match)) {
            const size_t step = std::max<int64_t>(1, MAX_ELEMENTS/(int64_t) group.pivots.size());

            for (size_t i0 = 0; i0 < group.evicted.size(); i0 += step) {
                if (graph.is_full() && !graph.run()) {
                    return false;
                }

                const std::vector<int32_t> evicted(
                        group.evicted.begin() + i0, group.evicted.begin() + std::min(i0 + step, group.evicted.size()));

                ggml_tensor * pivots     = normalized_keys(group.pivots.data(), group.pivots.size());
                ggml_tensor * similarity = ggml_mul_mat(graph.ctx(), pivots, normalized_keys(evicted.data(), evicted.size()));
                ggml_prec_set_acc(similarity, GGML_PREC_F32);                        // [n_pivots, n_evicted]

                graph.output(ggml_argmax(graph.ctx(), similarity), [&plan, evicted, pivots = group.pivots](const std::vector<uint8_t> & bytes) {
                    const int32_t * nearest = reinterpret_cast<const int32_t *>(bytes.data());

                    for (size_t i = 0; i < evicted.size(); ++i) {
                        plan.target[evicted[i]] = pivots[nearest[i]];
                        plan.fate  [evicted[i]] = KVMERGE_FOLDED;
                    }
                });
            }
        }
    }

    return true;
}

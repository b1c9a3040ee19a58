#include "kvmerge-match.h"

#include "kvmerge-keys.h"
#include "kvmerge-nearest.h"

#include <algorithm>
#include <map>

// scratch for the products of one piece of the graph
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

        if (plan.fate[i] == KVMERGE_DROPPED && cell.mass > 0) {
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

    if (match == KVMERGE_MATCH_FLOW || match == KVMERGE_MATCH_FLOW_REVERSED) {
        const bool crosses = flow.rho >= engine.params.theta;

        match = crosses == (match == KVMERGE_MATCH_FLOW) ? KVMERGE_MATCH_ANY : KVMERGE_MATCH_MODALITY;
    }

    const bool fuse = kvmerge_can_fuse_nearest(layer.k);

    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        auto & plan = plans[h];

        plan.target.assign(plan.cells.size(), -1);
        for (int32_t i : plan.kept) {
            plan.target[i] = i;
        }

        if (match == KVMERGE_MATCH_NONE) {
            continue;
        }

        for (const auto & group : make_groups(plan, match)) {
            const size_t step = fuse ? group.evicted.size() : std::max<int64_t>(1, MAX_ELEMENTS/(int64_t) group.pivots.size());

            for (size_t i0 = 0; i0 < group.evicted.size(); i0 += step) {
                if (graph.is_full() && !graph.run()) {
                    return false;
                }

                const std::vector<int32_t> evicted(
                        group.evicted.begin() + i0, group.evicted.begin() + std::min(i0 + step, group.evicted.size()));

                // the norm of the evicted key does not change which pivot is nearest
                ggml_tensor * pivots  = ggml_l2_norm(graph.ctx(), kvmerge_build_keys(graph, layer, h, cells, group.pivots), 1e-12f);
                ggml_tensor * nearest = kvmerge_build_nearest(graph.ctx(), pivots, kvmerge_build_keys(graph, layer, h, cells, evicted), fuse);

                graph.output(nearest, [&plan, evicted, pivots = group.pivots](const std::vector<uint8_t> & bytes) {
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

bool kvmerge_similarity_layer(
              kvmerge_graph         & graph,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans) {
    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        auto & plan = plans[h];

        std::vector<int32_t> member;
        std::vector<int32_t> pivot;

        for (size_t i = 0; i < plan.cells.size(); ++i) {
            if (plan.fate[i] == KVMERGE_FOLDED) {
                member.push_back(i);
                pivot.push_back(plan.target[i]);
            }
        }

        plan.similarity.assign(plan.cells.size(), 1.0f);

        if (member.empty()) {
            continue;
        }
        if (graph.is_full() && !graph.run()) {
            return false;
        }

        kvmerge_build_similarity(graph, layer, h, cells, member, pivot, [&plan, member](const float * cosine) {
            for (size_t i = 0; i < member.size(); ++i) {
                plan.similarity[member[i]] = cosine[i];
            }
        });
    }

    return true;
}

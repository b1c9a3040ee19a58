#include "kvmerge-match.h"

#include "kvmerge-host.h"
#include "kvmerge-keys.h"
#include "kvmerge-nearest.h"
#include "kvmerge-parallel.h"

#include <algorithm>
#include <map>

// scratch for the products of one piece of the graph
static constexpr int64_t MAX_ELEMENTS = 4*1024*1024;

// tokens that one thread matches at a time
static constexpr size_t MAX_EVICTED = 1024;

// evicted cells and the pivots open to them, as indices into the plan
struct match_group {
    std::vector<int32_t> evicted;
    std::vector<int32_t> pivots;
};

static std::vector<match_group> make_groups(const kvmerge_plan & plan, int32_t match) {
    std::map<int32_t, match_group> groups;

    match_group * cur      = nullptr; // that of the key last_key: most cells follow one of the same group
    int32_t       last_key = -1;

    for (size_t i = 0; i < plan.cells.size(); ++i) {
        const auto & cell = plan.cells[i];

        const int32_t key =
            match == KVMERGE_MATCH_MODALITY ? cell.modality :
            match == KVMERGE_MATCH_SEGMENT  ? cell.segment  : 0;

        if (!cur || key != last_key) {
            cur      = &groups[key];
            last_key = key;
        }

        if (plan.is_left(i)) {
            cur->evicted.push_back(i);
        } else if (plan.is_open(i)) {
            cur->pivots.push_back(i);
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

static void fold_into(kvmerge_plan & plan, const int32_t * evicted, const int32_t * pivot, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        plan.fold(evicted[i], pivot[i]);
    }
}

// on the CPU, without storing products
static bool match_fused(
        kvmerge_graph & graph, const kvmerge_layer & layer, int32_t match, const std::vector<uint32_t> & cells, std::vector<kvmerge_plan> & plans) {
    struct match_job {
        int32_t             head;
        const match_group * group;
        size_t              first; // of group->evicted
    };

    std::vector<std::vector<match_group>> groups;
    std::vector<match_job>                jobs;

    for (const auto & plan : plans) {
        groups.push_back(make_groups(plan, match));
    }

    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        for (const auto & group : groups[h]) {
            for (size_t first = 0; first < group.evicted.size(); first += MAX_EVICTED) {
                jobs.push_back({ h, &group, first });
            }
        }
    }

    return kvmerge_parallel(graph, jobs.size(), [&](int i) {
        const auto & job = jobs[i];

        const int32_t * evicted   = job.group->evicted.data() + job.first;
        const size_t    n_evicted = std::min(MAX_EVICTED, job.group->evicted.size() - job.first);

        std::vector<int32_t> nearest(n_evicted);
        kvmerge_nearest({ layer, cells, job.head }, job.group->pivots, evicted, n_evicted, nearest.data());

        fold_into(plans[job.head], evicted, nearest.data(), n_evicted);
    });
}

static bool match_in_graph(
        kvmerge_graph & graph, const kvmerge_layer & layer, int32_t match, const std::vector<uint32_t> & cells, std::vector<kvmerge_plan> & plans) {
    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        auto & plan = plans[h];

        for (const auto & group : make_groups(plan, match)) {
            const size_t step = std::max<int64_t>(1, MAX_ELEMENTS/(int64_t) group.pivots.size());

            for (size_t i0 = 0; i0 < group.evicted.size(); i0 += step) {
                if (graph.is_full() && !graph.run()) {
                    return false;
                }

                const std::vector<int32_t> evicted(
                        group.evicted.begin() + i0, group.evicted.begin() + std::min(i0 + step, group.evicted.size()));

                ggml_tensor * k       = kvmerge_build_keys(graph, layer, h, cells, evicted);
                ggml_tensor * pivots  = kvmerge_build_keys(graph, layer, h, cells, group.pivots);

                // the norm of the evicted key does not change which pivot is nearest
                ggml_tensor * product = ggml_mul_mat(graph.ctx(), ggml_l2_norm(graph.ctx(), pivots, 1e-12f), k); // [n_pivots, n_evicted]
                ggml_prec_set_acc(product, GGML_PREC_F32);

                graph.output(ggml_argmax(graph.ctx(), product), [&plan, evicted, pivots = group.pivots](const std::vector<uint8_t> & bytes) {
                    const int32_t * best = reinterpret_cast<const int32_t *>(bytes.data());

                    std::vector<int32_t> nearest(evicted.size());
                    std::transform(best, best + evicted.size(), nearest.begin(), [&](int32_t p) { return pivots[p]; });

                    fold_into(plan, evicted.data(), nearest.data(), evicted.size());
                });
            }
        }
    }

    return graph.run();
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

    if (match == KVMERGE_MATCH_NONE) {
        return true;
    }

    return kvmerge_is_host(layer.k) ? match_fused(graph, layer, match, cells, plans) : match_in_graph(graph, layer, match, cells, plans);
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
            if (plan.is_folded(i)) {
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

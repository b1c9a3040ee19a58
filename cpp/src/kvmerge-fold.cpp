#include "kvmerge-fold.h"

#include <algorithm>

// The sum over a group is a tree: its members stand side by side, padded to a power of two, and each level adds
// neighbours. Groups that need more levels come first, so that at every level the finished ones are the tail.
// Only get_rows, mul, add and set_rows are needed, which every backend has.

namespace {

struct fold_group {
    int32_t              cell;   // index of the destination among the sequence's cells
    std::vector<int32_t> member; // indices among the sequence's cells
    std::vector<float>   weight;
    int                  level = 0;
};

struct fold_rows {
    std::vector<int32_t>              index;  // [n_rows] index among the sequence's cells
    std::vector<float>                weight; // [n_rows]
    std::vector<std::vector<int32_t>> done;   // [level] destinations of the groups that are complete there
};

} // namespace

static std::vector<fold_group> make_groups(const kvmerge_plan & plan, int32_t n_cells, bool move) {
    // a layer that keeps fewer cells than the others keeps them at the end
    const int32_t offset = n_cells - plan.kept.size();

    std::vector<int32_t> group_of(plan.cells.size(), -1);

    std::vector<fold_group> groups(plan.kept.size());
    for (size_t c = 0; c < plan.kept.size(); ++c) {
        groups[c].cell = offset + c;
        group_of[plan.kept[c]] = c;
    }

    for (size_t i = 0; i < plan.cells.size(); ++i) {
        const bool is_pivot = plan.target[i] == (int32_t) i;

        if (plan.target[i] >= 0 && (move || is_pivot)) {
            auto & group = groups[group_of[plan.target[i]]];

            group.member.push_back(i);
            group.weight.push_back(move ? plan.weight[i] : 1.0f);
        }
    }

    for (auto & group : groups) {
        while ((1u << group.level) < group.member.size()) {
            group.level++;
        }
    }

    return groups;
}

static fold_rows make_rows(std::vector<fold_group> groups) {
    std::stable_sort(groups.begin(), groups.end(), [](const fold_group & a, const fold_group & b) { return a.level > b.level; });

    fold_rows rows;
    rows.done.resize(groups.empty() ? 1 : groups.front().level + 1);

    for (const auto & group : groups) {
        rows.done[group.level].push_back(group.cell);

        for (size_t i = 0; i < (1u << group.level); ++i) {
            const bool is_padding = i >= group.member.size();

            rows.index .push_back(is_padding ? group.member[0] : group.member[i]);
            rows.weight.push_back(is_padding ? 0.0f            : group.weight[i]);
        }
    }

    return rows;
}

// sums[level]: [d, number of groups complete at that level], in the order of rows.done[level]
static std::vector<ggml_tensor *> build_sums(kvmerge_graph & graph, ggml_tensor * x, const fold_rows & rows) {
    ggml_context * ctx = graph.ctx();

    std::vector<ggml_tensor *> sums;

    for (size_t level = 0; level < rows.done.size(); ++level) {
        const int64_t n_done = rows.done[level].size();
        const int64_t n_rest = x->ne[1] - n_done;

        sums.push_back(n_done > 0 ? ggml_view_2d(ctx, x, x->ne[0], n_done, x->nb[1], n_rest*x->nb[1]) : nullptr);

        if (n_rest > 0) {
            ggml_tensor * even = ggml_view_2d(ctx, x, x->ne[0], n_rest/2, 2*x->nb[1], 0);
            ggml_tensor * odd  = ggml_view_2d(ctx, x, x->ne[0], n_rest/2, 2*x->nb[1], x->nb[1]);

            x = ggml_add(ctx, even, odd);                                                // [d, n_rest/2]
        }
    }

    return sums;
}

static void build_fold(
        kvmerge_graph & graph, ggml_tensor * cache, int64_t d, int32_t head, bool trans,
        const std::vector<uint32_t> & cells, const fold_rows & rows) {
    ggml_context * ctx = graph.ctx();

    const int64_t kv_size = cache->ne[1];
    const int64_t n_heads = cache->ne[0]/d; // of a cell; some may be padding
    const int64_t n_rows  = rows.index.size();

    std::vector<int32_t> index(n_rows);

    ggml_tensor * flat;
    if (trans) {
        // memory is [kv_size, n_embd]: bring the head's part into [d, kv_size]
        const uint32_t n_used = *std::max_element(cells.begin(), cells.end()) + 1;

        const size_t type_size = ggml_type_size(cache->type);

        flat = ggml_view_2d(ctx, cache, n_used, d, kv_size*type_size, head*d*kv_size*type_size);
        flat = ggml_cont(ctx, ggml_transpose(ctx, flat));                                // [d, n_used]

        for (int64_t i = 0; i < n_rows; ++i) {
            index[i] = cells[rows.index[i]];
        }
    } else {
        flat = ggml_reshape_2d(ctx, cache, d, kv_size*n_heads);                          // [d, n_heads*kv_size]

        for (int64_t i = 0; i < n_rows; ++i) {
            index[i] = (int32_t) (cells[rows.index[i]]*n_heads + head);
        }
    }

    ggml_tensor * x = ggml_get_rows(ctx, flat, graph.input(GGML_TYPE_I32, { n_rows }, index.data()));
    x = ggml_mul(ctx, x, graph.input(GGML_TYPE_F32, { 1, n_rows }, rows.weight.data())); // F32 [d, n_rows]

    const auto sums = build_sums(graph, x, rows);

    // all sums before the first store
    for (ggml_tensor * sum : sums) {
        if (sum) {
            graph.store(sum);
        }
    }

    for (size_t level = 0; level < sums.size(); ++level) {
        if (!sums[level]) {
            continue;
        }

        std::vector<int64_t> dst;

        if (trans) {
            for (int32_t c : rows.done[level]) {
                for (int64_t e = 0; e < d; ++e) {
                    dst.push_back((head*d + e)*kv_size + cells[c]);
                }
            }

            ggml_tensor * values = ggml_reshape_2d(ctx, cache, 1, ggml_nelements(cache));
            ggml_tensor * sum    = ggml_reshape_2d(ctx, sums[level], 1, dst.size());

            graph.store(ggml_set_rows(ctx, values, sum, graph.input(GGML_TYPE_I64, { (int64_t) dst.size() }, dst.data())));
        } else {
            for (int32_t c : rows.done[level]) {
                dst.push_back(cells[c]*n_heads + head);
            }

            graph.store(ggml_set_rows(ctx, flat, sums[level], graph.input(GGML_TYPE_I64, { (int64_t) dst.size() }, dst.data())));
        }
    }
}

bool kvmerge_fold_layer(
              kvmerge_graph             & graph,
        const kvmerge_engine            & engine,
        const kvmerge_layer             & layer,
        const std::vector<uint32_t>     & cells,
        const std::vector<kvmerge_plan> & plans,
              int32_t                     n_cells) {
    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        if (graph.is_full() && !graph.run()) {
            return false;
        }

        const auto rows_k = make_rows(make_groups(plans[h], n_cells, engine.params.move_keys));
        const auto rows_v = make_rows(make_groups(plans[h], n_cells, true));

        build_fold(graph, layer.k, layer.n_embd_head_k, h, false,          cells, rows_k);
        build_fold(graph, layer.v, layer.n_embd_head_v, h, engine.v_trans, cells, rows_v);
    }

    return true;
}

#include "kvmerge-sums.h"

#include "kvmerge-rows.h"

#include <algorithm>
#include <numeric>

ggml_tensor * kvmerge_build_sum_values(kvmerge_graph & graph, ggml_tensor * x) {
    const std::vector<float> ones(x->ne[0], 1.0f);

    ggml_tensor * sum = ggml_mul_mat(graph.ctx(), x, graph.input(GGML_TYPE_F32, { x->ne[0] }, ones.data()));
    ggml_prec_set_acc(sum, GGML_PREC_F32);

    return sum;
}

ggml_tensor * kvmerge_build_sum_rows(ggml_context * ctx, ggml_tensor * x) {
    ggml_tensor * odd = nullptr; // rows that were left over

    while (x->ne[1] > 1) {
        const int64_t half = x->ne[1]/2;

        const auto rows = [&](int64_t first, int64_t n) {
            return ggml_view_3d(ctx, x, x->ne[0], n, x->ne[2], x->nb[1], x->nb[2], first*x->nb[1]);
        };

        if (x->ne[1] % 2 == 1) {
            ggml_tensor * last = rows(2*half, 1);
            odd = odd ? ggml_add(ctx, odd, last) : last;
        }

        x = ggml_add(ctx, rows(0, half), rows(half, half));                              // [d, n/2, m]
    }

    return odd ? ggml_add(ctx, x, odd) : x;
}

//
// groups, on any backend: a tree
//

// The members of a group stand side by side, padded to a power of two, and each level adds neighbours. Groups that need
// more levels come first, so that at every level the finished ones are the tail.
// Only get_rows, mul and add are needed, which every backend has.
static std::vector<kvmerge_sum> build_tree(kvmerge_graph & graph, ggml_tensor * x, const kvmerge_groups_of_rows & rows) {
    ggml_context * ctx = graph.ctx();

    const size_t n_groups = rows.first.size() - 1;

    std::vector<int32_t> level(n_groups);
    for (size_t g = 0; g < n_groups; ++g) {
        while ((1 << level[g]) < rows.first[g + 1] - rows.first[g]) {
            level[g]++;
        }
    }

    std::vector<int32_t> order(n_groups);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return level[a] > level[b]; });

    std::vector<kvmerge_sum> res(level[order[0]] + 1);

    std::vector<int32_t> index;
    std::vector<float>   weight;

    for (int32_t g : order) {
        res[level[g]].group.push_back(g);

        for (int32_t j = rows.first[g]; j < rows.first[g] + (1 << level[g]); ++j) {
            const bool is_padding = j >= rows.first[g + 1];

            index .push_back(rows.row[is_padding ? rows.first[g] : j]);
            weight.push_back(is_padding ? 0.0f : rows.weight[j]);
        }
    }

    const int64_t n_rows = index.size();

    x = ggml_get_rows(ctx, x, graph.input(GGML_TYPE_I32, { n_rows }, index.data()));
    x = ggml_mul(ctx, x, graph.input(GGML_TYPE_F32, { 1, n_rows }, weight.data()));      // F32 [d, n_rows]

    for (auto & cur : res) {
        const int64_t n_done = cur.group.size();
        const int64_t n_rest = x->ne[1] - n_done;

        cur.sum = n_done > 0 ? ggml_view_2d(ctx, x, x->ne[0], n_done, x->nb[1], n_rest*x->nb[1]) : nullptr;

        if (n_rest > 0) {
            ggml_tensor * even = ggml_view_2d(ctx, x, x->ne[0], n_rest/2, 2*x->nb[1], 0);
            ggml_tensor * odd  = ggml_view_2d(ctx, x, x->ne[0], n_rest/2, 2*x->nb[1], x->nb[1]);

            x = ggml_add(ctx, even, odd);                                                // [d, n_rest/2]
        }
    }

    res.erase(std::remove_if(res.begin(), res.end(), [](const kvmerge_sum & cur) { return !cur.sum; }), res.end());

    return res;
}

//
// groups, on the CPU: one operation
//

// sum [n_groups][d]: group g is of rows first[g] to first[g + 1]
template <typename /*vec_f*/, typename /*vec_i*/>
KVMERGE_INLINE void add_rows(const kvmerge_rows & rows, const int32_t * row, const float * weight, const int32_t * first, int64_t n_groups, float * sum) {
    std::vector<float> x(rows.d);

    for (int64_t g = 0; g < n_groups; ++g, sum += rows.d) {
        std::fill(sum, sum + rows.d, 0.0f);

        for (int32_t j = first[g]; j < first[g + 1]; ++j) {
            kvmerge_prefetch_row(rows, row[std::min(j + 16, first[n_groups] - 1)]);
            kvmerge_read_row(rows, row[j], x.data());

            for (int64_t e = 0; e < rows.d; ++e) {
                sum[e] += weight[j]*x[e];
            }
        }
    }
}

KVMERGE_FOR_EACH_WIDTH(sum_groups, add_rows,
        (const kvmerge_rows & rows, const int32_t * row, const float * weight, const int32_t * first, int64_t n_groups, float * sum),
        (rows, row, weight, first, n_groups, sum))

static void compute_sums(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const int64_t d        = dst->ne[0];
    const int64_t n_groups = dst->ne[1];

    const int32_t * row    = static_cast<const int32_t *>(dst->src[1]->data);
    const float   * weight = static_cast<const float   *>(dst->src[2]->data);
    const int32_t * first  = static_cast<const int32_t *>(dst->src[3]->data);

    const int64_t g0 = n_groups*ith/nth;
    const int64_t g1 = n_groups*(ith + 1)/nth;

    sum_groups({ dst->src[0], d }, row, weight, first + g0, g1 - g0, static_cast<float *>(dst->data) + g0*d);
}

static std::vector<kvmerge_sum> build_fused(kvmerge_graph & graph, ggml_tensor * x, const kvmerge_groups_of_rows & rows) {
    const int64_t n_rows   = rows.row.size();
    const int64_t n_groups = rows.first.size() - 1;

    ggml_tensor * args[] = {
        x,
        graph.input(GGML_TYPE_I32, { n_rows       }, rows.row   .data()),
        graph.input(GGML_TYPE_F32, { n_rows       }, rows.weight.data()),
        graph.input(GGML_TYPE_I32, { n_groups + 1 }, rows.first .data()),
    };

    kvmerge_sum res;

    res.sum = ggml_custom_4d(graph.ctx(), GGML_TYPE_F32, x->ne[0], n_groups, 1, 1, args, 4, compute_sums, GGML_N_TASKS_MAX, nullptr);
    res.group.resize(n_groups);
    std::iota(res.group.begin(), res.group.end(), 0);

    return { res };
}

std::vector<kvmerge_sum> kvmerge_build_sum_groups(kvmerge_graph & graph, ggml_tensor * x, const kvmerge_groups_of_rows & rows, bool fuse) {
    return fuse ? build_fused(graph, x, rows) : build_tree(graph, x, rows);
}

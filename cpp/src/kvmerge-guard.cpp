#include "kvmerge-guard.h"

#include "kvmerge-values.h"
#include "kvmerge-weigh.h"

#include <cmath>

// softmax of the given logits in place; entries of -INFINITY get nothing
static void soft_max(std::vector<double> & x) {
    double max = -INFINITY;
    for (double v : x) {
        max = std::max(max, v);
    }

    double sum = 0;
    for (double & v : x) {
        v = std::exp(v - max);
        sum += v;
    }
    for (double & v : x) {
        v /= sum;
    }
}

// For one held-out query, the weights of all n values in (merged - full) and in (evicted - full): their norms, taken
// through the values, are the errors of the output.
static void add_differences(const kvmerge_plan & plan, bool move_keys, const std::vector<float> & logits, std::vector<float> & merged, std::vector<float> & evicted) {
    const size_t n = plan.cells.size();

    std::vector<double> full(n);
    for (size_t i = 0; i < n; ++i) {
        full[i] = logits[i] + plan.cells[i].bias;
    }

    // cells of the result: the logit of a moved key is the weighted mean of the logits
    std::vector<double> cell(n, -INFINITY);
    std::vector<double> kept(n, -INFINITY);

    for (size_t c = 0; c < plan.kept.size(); ++c) {
        cell[plan.kept[c]] = plan.bias[c] + (move_keys ? 0.0 : logits[plan.kept[c]]);
        kept[plan.kept[c]] = full[plan.kept[c]];
    }
    for (size_t i = 0; i < n && move_keys; ++i) {
        if (plan.target[i] >= 0) {
            cell[plan.target[i]] += (double) plan.weight[i]*logits[i];
        }
    }

    soft_max(full);
    soft_max(cell);
    soft_max(kept);

    for (size_t i = 0; i < n; ++i) {
        const double share = plan.target[i] >= 0 ? cell[plan.target[i]]*plan.weight[i] : 0.0;

        merged .push_back((float) (share   - full[i]));
        evicted.push_back((float) (kept[i] - full[i]));
    }
}

bool kvmerge_guard_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans,
              int32_t               & n_guarded) {
    std::vector<std::vector<float>> errors(layer.n_head_kv); // [head] squared error of the output: merged, then evicted

    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        auto & plan = plans[h];

        const int64_t n = plan.cells.size();

        if (plan.n_proxies < 2) {
            continue;
        }
        if (graph.is_full() && !graph.run()) {
            return false;
        }

        kvmerge_fit_bias(plan, engine.params, 0, 2);

        std::vector<float> weights; // [n_rows][n]
        std::vector<float> evicted;
        std::vector<float> logits(n);
        for (int32_t q = 1; q < plan.n_proxies; q += 2) {
            for (int64_t i = 0; i < n; ++i) {
                logits[i] = plan.logit(q, i);
            }
            add_differences(plan, engine.params.move_keys, logits, weights, evicted);
        }
        weights.insert(weights.end(), evicted.begin(), evicted.end());

        const int64_t n_rows = weights.size()/n;

        ggml_context * ctx = graph.ctx();

        ggml_tensor * v = ggml_cont(ctx, ggml_transpose(ctx, kvmerge_build_values(graph, engine, layer, cells, h))); // [n, d]
        ggml_tensor * w = graph.input(GGML_TYPE_F32, { n, n_rows }, weights.data());

        ggml_tensor * error = ggml_mul_mat(ctx, v, w);                                   // [d, n_rows]
        ggml_prec_set_acc(error, GGML_PREC_F32);

        graph.output(ggml_sum_rows(ctx, ggml_sqr(ctx, error)), [&errors, h](const std::vector<uint8_t> & bytes) {
            const float * values = reinterpret_cast<const float *>(bytes.data());
            errors[h].assign(values, values + bytes.size()/sizeof(float));
        });
    }

    if (!graph.run()) {
        return false;
    }

    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        auto & plan = plans[h];

        double sum[2] = {};
        for (size_t i = 0; i < errors[h].size(); ++i) {
            sum[2*i >= errors[h].size()] += errors[h][i];
        }

        if (sum[0] > sum[1]) {
            kvmerge_unfold(plan);
            kvmerge_weigh (plan, engine.params);
            n_guarded++;
        }

        kvmerge_fit_bias(plan, engine.params);
    }

    return true;
}

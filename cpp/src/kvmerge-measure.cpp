#include "kvmerge-measure.h"

#include "kvmerge-groups.h"
#include "kvmerge-host.h"
#include "kvmerge-parallel.h"
#include "kvmerge-score.h"
#include "kvmerge-values.h"

#include <algorithm>
#include <cmath>

// queries that are asked: they cost little beside the scores, which take twice to four times as many
static constexpr size_t N_HELD_OUT = 4;

// attention weights, or keys, of one piece of the graph: its buffers stay with the context
static constexpr int64_t MAX_ELEMENTS = 512*1024;

std::vector<int32_t> kvmerge_held_out(const kvmerge_engine & engine, llama_seq_id seq_id, int32_t n_seen) {
    const auto samples = engine.observer.samples(seq_id, n_seen);
    const auto fitted  = kvmerge_fitted_text(engine, seq_id, n_seen);

    std::vector<int32_t> left;
    for (int32_t slot : samples) {
        if (engine.observer.row(slot).modality == KVMERGE_TEXT && std::find(fitted.begin(), fitted.end(), slot) == fitted.end()) {
            left.push_back(slot);
        }
    }

    // the last ones: they see most of what is merged
    if (left.size() > N_HELD_OUT) {
        left.erase(left.begin(), left.end() - N_HELD_OUT);
    }

    return left;
}

// From what a query gives to each cell to what it gives it less after the merge.
//   order   index of its token in the sequence
//   logit   [n] without bias
//   weight  [n] changed in place
static void subtract_merged(
        const kvmerge_plan & plan, const kvmerge_groups & groups, bool move_keys, int32_t order, const float * logit, float * weight) {
    const int64_t n = plan.cells.size();

    const auto is_seen = [&](int32_t i) { return plan.cells[i].mass > 0 && plan.cells[i].order <= order; };

    const int64_t best = std::max_element(weight, weight + n) - weight;
    if (!(weight[best] > 0)) {
        return;
    }

    // logarithm of what the weights were divided by, attention sinks and all
    const float norm = logit[best] + plan.cells[best].bias - std::log(weight[best]);

    const size_t n_groups = groups.pivot.size();

    std::vector<float> after(n_groups, -1.0f); // weight of a group in the same measure, -1: it stays as it was

    double total = 1;

    for (size_t c = 0; c < n_groups; ++c) {
        const int32_t * first = groups.index.data() + groups.first[c];
        const int32_t * last  = groups.index.data() + groups.first[c + 1];

        if (last - first == 1 || !std::all_of(first, last, is_seen)) {
            continue;
        }

        // the logit of a moved key is the weighted mean of the logits, because it is linear in the key
        float own = move_keys ? 0 : logit[groups.pivot[c]];
        for (const int32_t * i = first; i < last; ++i) {
            own   += move_keys ? plan.weight[*i]*logit[*i] : 0;
            total -= weight[*i];
        }

        after[c] = std::exp(own + plan.bias[c] - norm);
        total   += after[c];
    }
    for (int64_t i = 0; i < n; ++i) {
        total -= plan.target[i] < 0 ? weight[i] : 0;
    }

    const float scale = 1/std::max(total, 1e-6);

    for (size_t c = 0; c < n_groups; ++c) {
        for (int32_t j = groups.first[c]; j < groups.first[c + 1]; ++j) {
            const int32_t i = groups.index[j];

            weight[i] -= scale*(after[c] < 0 ? weight[i] : after[c]*plan.weight[i]);
        }
    }
}

// squared length of sums of the values of one KV head: weights [n, n_sums]
//   values  [n_embd_head_v, n]; on the host as they are, which saves bringing them into the other order, else transposed
static void build_lengths(
        kvmerge_graph & graph, ggml_tensor * values, bool is_host, const float * weights, int64_t n, int64_t n_sums, double & length) {
    ggml_context * ctx = graph.ctx();

    ggml_tensor * w = graph.input(GGML_TYPE_F32, { n, n_sums }, weights);

    ggml_tensor * sums = is_host ? ggml_out_prod(ctx, values, ggml_transpose(ctx, w)) : ggml_mul_mat(ctx, values, w);

    if (!is_host) {
        ggml_prec_set_acc(sums, GGML_PREC_F32);
    }

    graph.output(sums, [&length](const std::vector<uint8_t> & bytes) {
        const float * x = reinterpret_cast<const float *>(bytes.data());

        for (size_t i = 0; i < bytes.size()/sizeof(float); ++i) {
            length += (double) x[i]*x[i];
        }
    });
}

bool kvmerge_measure_layer(
              kvmerge_graph             & graph,
        const kvmerge_engine            & engine,
        const kvmerge_layer             & layer,
        const std::vector<int32_t>      & slots,
        const std::vector<uint32_t>     & cells,
        const std::vector<kvmerge_plan> & plans,
              kvmerge_error_sums        & sums) {
    const int64_t n       = cells.size();
    const int64_t n_rows  = slots.size();
    const int64_t n_asked = n_rows*(layer.n_head/layer.n_head_kv); // of a KV head

    const bool is_host = kvmerge_is_host(layer.v);

    const int64_t n_wide  = std::max<int64_t>({ n_asked, layer.n_embd_head_k, layer.n_embd_head_v }); // elements of a cell and head

    const int32_t step = std::min<int64_t>(layer.n_head_kv, std::max<int64_t>(1, MAX_ELEMENTS/(n*n_wide)));

    for (int32_t head = 0; head < layer.n_head_kv; head += step) {
        const int32_t n_heads = std::min(step, layer.n_head_kv - head);

        std::vector<float> logits;
        std::vector<float> before; // [n, n_asked, n_heads]

        const auto take = [](std::vector<float> & to) {
            return [&to](const std::vector<uint8_t> & bytes) {
                const float * x = reinterpret_cast<const float *>(bytes.data());
                to.assign(x, x + bytes.size()/sizeof(float));
            };
        };

        ggml_tensor * kq = kvmerge_build_logits(graph, engine, layer, slots, cells, head, n_heads);

        graph.output(kq, take(logits));
        graph.output(kvmerge_build_attention(graph, engine, layer, kq, slots, plans, head, n_heads), take(before));

        if (!graph.run()) {
            return false;
        }

        std::vector<float> change = before;

        const bool ok = kvmerge_parallel(graph, n_heads, [&](int h) {
            const auto groups = kvmerge_make_groups(plans[head + h]);

            for (int64_t q = 0; q < n_asked; ++q) {
                const int64_t at = (h*n_asked + q)*n;

                subtract_merged(plans[head + h], groups, engine.params.move_keys, engine.observer.row(slots[q % n_rows]).order,
                        logits.data() + at, change.data() + at);
            }
        });

        if (!ok) {
            return false;
        }

        for (int32_t h = 0; h < n_heads; ++h) {
            ggml_tensor * v = kvmerge_build_values(graph, engine, layer, cells, head + h);
            if (!is_host) {
                v = ggml_cont(graph.ctx(), ggml_transpose(graph.ctx(), v));              // [n, n_embd_head_v]
            }

            build_lengths(graph, v, is_host, before.data() + h*n_asked*n, n, n_asked, sums.whole);
            build_lengths(graph, v, is_host, change.data() + h*n_asked*n, n, n_asked, sums.moved);

            if (graph.is_full() && !graph.run()) {
                return false;
            }
        }

        if (!graph.run()) {
            return false;
        }
    }

    return true;
}

#include "kvmerge-score.h"

#include "kvmerge-sums.h"
#include "kvmerge-values.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// scratch for the attention weights of one piece of the graph
static constexpr int64_t MAX_ELEMENTS = 8*1024*1024;

// K of the given cells: [n_embd_head_k, n, n_head_kv]
static ggml_tensor * build_keys(kvmerge_graph & graph, const kvmerge_layer & layer, const std::vector<uint32_t> & cells, int32_t head, int32_t n_heads) {
    ggml_context * ctx = graph.ctx();

    const int64_t n = cells.size();
    const size_t  row = ggml_row_size(layer.k->type, layer.n_embd_head_k);

    if (cells.back() - cells.front() + 1 == (uint32_t) n) {
        return ggml_view_3d(ctx, layer.k, layer.n_embd_head_k, n, n_heads, layer.k->nb[1], row, cells.front()*layer.k->nb[1] + head*row);
    }

    // scattered: gather them, head by head
    ggml_tensor * flat = ggml_reshape_2d(ctx, layer.k, layer.n_embd_head_k, layer.k->ne[1]*layer.n_head_kv);

    std::vector<int32_t> idx(n*n_heads);
    for (int32_t h = 0; h < n_heads; ++h) {
        for (int64_t i = 0; i < n; ++i) {
            idx[h*n + i] = (int32_t) cells[i]*layer.n_head_kv + head + h;
        }
    }

    ggml_tensor * k = ggml_get_rows(ctx, flat, graph.input(GGML_TYPE_I32, { n*n_heads }, idx.data()));

    return ggml_reshape_3d(ctx, k, layer.n_embd_head_k, n, n_heads);
}

// attention logits of the queries in `slots` over the cells, without bias and mask, for n_heads KV heads from `head` on:
// [n, rows, n_group*n_heads]
static ggml_tensor * build_logits(
        kvmerge_graph & graph, const kvmerge_engine & engine, const kvmerge_layer & layer,
        const std::vector<int32_t> & slots, const std::vector<uint32_t> & cells, int32_t head, int32_t n_heads) {
    ggml_context * ctx = graph.ctx();

    const int64_t n_rows  = slots.size();
    const int64_t n_group = layer.n_head/layer.n_head_kv;
    const int64_t d       = layer.n_embd_head_k;

    ggml_tensor * q = ggml_get_rows(ctx, layer.q, graph.input(GGML_TYPE_I32, { n_rows }, slots.data()));
    q = ggml_view_3d(ctx, q, d, n_rows, n_group*n_heads, q->nb[1], d*sizeof(float), head*n_group*d*sizeof(float));

    ggml_tensor * k = build_keys(graph, layer, cells, head, n_heads);

    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);                                          // [n, rows, n_group*n_heads]
    ggml_prec_set_acc(kq, GGML_PREC_F32);

    if (engine.logit_softcap > 0.0f) {
        kq = ggml_scale(ctx, kq, layer.kq_scale/engine.logit_softcap);
        kq = ggml_tanh (ctx, kq);

        return ggml_scale(ctx, kq, engine.logit_softcap);
    }

    return ggml_scale(ctx, kq, layer.kq_scale);
}

// attention weights from the logits: [n, rows, n_group, n_heads]
static ggml_tensor * build_attention(
        kvmerge_graph & graph, const kvmerge_engine & engine, const kvmerge_layer & layer, ggml_tensor * kq,
        const std::vector<int32_t> & slots, const std::vector<kvmerge_plan> & plans, int32_t head, int32_t n_heads) {
    ggml_context * ctx = graph.ctx();

    const int64_t n       = kq->ne[0];
    const int64_t n_rows  = slots.size();
    const int64_t n_group = layer.n_head/layer.n_head_kv;

    if (engine.has_bias) {
        std::vector<float> bias(n*n_heads);
        for (int32_t h = 0; h < n_heads; ++h) {
            for (int64_t i = 0; i < n; ++i) {
                bias[h*n + i] = plans[head + h].cells[i].bias;
            }
        }

        kq = ggml_reshape_4d(ctx, kq, n, n_rows, n_group, n_heads);
        kq = ggml_add       (ctx, kq, graph.input(GGML_TYPE_F32, { n, 1, 1, n_heads }, bias.data()));
        kq = ggml_reshape_3d(ctx, kq, n, n_rows, n_group*n_heads);
    }

    // a query sees the cells up to its own token
    std::vector<float> mask(n*n_rows);
    for (int64_t j = 0; j < n_rows; ++j) {
        const int32_t order = engine.observer.row(slots[j]).order;

        for (int64_t i = 0; i < n; ++i) {
            mask[j*n + i] = plans[0].cells[i].order <= order ? 0.0f : -INFINITY;
        }
    }

    kq = ggml_soft_max_ext(ctx, kq, graph.input(GGML_TYPE_F32, { n, n_rows }, mask.data()), 1.0f, 0.0f);

    if (layer.sinks) {
        ggml_soft_max_add_sinks(kq, ggml_view_1d(ctx, layer.sinks, n_group*n_heads, head*n_group*layer.sinks->nb[0]));
    }

    return ggml_reshape_4d(ctx, kq, n, n_rows, n_group, n_heads);
}

// logits of queries in `slots`, appended to what the plans have
static void output_logits(
        kvmerge_graph & graph, ggml_tensor * kq, std::vector<kvmerge_plan> & plans, int32_t head, int32_t n_heads, bool proxies) {
    const size_t n_logits = ggml_nelements(kq)/n_heads;

    graph.output(kq, [&plans, n_logits, head, n_heads, proxies](const std::vector<uint8_t> & bytes) {
        const float * logits = reinterpret_cast<const float *>(bytes.data());
        for (int32_t h = 0; h < n_heads; ++h) {
            auto & plan = plans[head + h];
            plan.logits.insert(plan.logits.end(), logits + h*n_logits, logits + (h + 1)*n_logits);
            if (proxies) {
                plan.n_proxies = plan.logits.size()/plan.cells.size();
            }
        }
    });
}

// at most `n` of the sampled queries of text, spread evenly
static std::vector<int32_t> spread_text(const kvmerge_observer & observer, const std::vector<int32_t> & samples, size_t n) {
    std::vector<int32_t> text;
    for (int32_t slot : samples) {
        if (observer.row(slot).modality == KVMERGE_TEXT) {
            text.push_back(slot);
        }
    }

    std::vector<int32_t> res;
    n = std::min(n, text.size());
    for (size_t i = 0; i < n; ++i) {
        res.push_back(text[i*text.size()/n]);
    }

    return res;
}

// I(i): what the proxy queries give to cell i, summed over queries and the group's heads (FlowMM eq. 8)
static void build_importance(
        kvmerge_graph & graph, const kvmerge_engine & engine, const kvmerge_layer & layer,
        const std::vector<int32_t> & slots, const std::vector<int32_t> & text, const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan> & plans, int32_t head, int32_t n_heads) {
    ggml_context * ctx = graph.ctx();

    const int64_t n = cells.size();

    ggml_tensor * kq = build_logits(graph, engine, layer, slots, cells, head, n_heads);

    if (engine.params.bias == KVMERGE_BIAS_FIT || engine.params.guard) {
        output_logits(graph, kq, plans, head, n_heads, true);

        // What is asked later is text: what text before looked for says more than the last question alone. These queries
        // are taken as if they were asked now, so they see all cells.
        if (!text.empty()) {
            output_logits(graph, build_logits(graph, engine, layer, text, cells, head, n_heads), plans, head, n_heads, false);
        }
    }

    ggml_tensor * a = build_attention(graph, engine, layer, kq, slots, plans, head, n_heads);

    a = ggml_reshape_3d(ctx, a, n, a->ne[1]*a->ne[2], n_heads);                          // [n, rows*n_group, n_heads]
    a = kvmerge_build_sum_rows(ctx, a);                                                  // [n, 1, n_heads]

    graph.output(a, [&plans, n, head, n_heads](const std::vector<uint8_t> & bytes) {
        for (int32_t h = 0; h < n_heads; ++h) {
            auto & score = plans[head + h].score;
            score.resize(n);
            memcpy(score.data(), bytes.data() + h*n*sizeof(float), n*sizeof(float));
        }
    });
}

// norms of the values of one KV head
static void build_value_norm(
        kvmerge_graph & graph, const kvmerge_engine & engine, const kvmerge_layer & layer,
        const std::vector<uint32_t> & cells, kvmerge_plan & plan, int32_t head) {
    ggml_context * ctx = graph.ctx();

    ggml_tensor * v = kvmerge_build_values(graph, engine, layer, cells, head);

    v = ggml_sqrt(ctx, kvmerge_build_sum_values(graph, ggml_mul(ctx, v, v)));            // [n]

    graph.output(v, [&plan](const std::vector<uint8_t> & bytes) {
        const float * norm = reinterpret_cast<const float *>(bytes.data());
        plan.value_norm.assign(norm, norm + bytes.size()/sizeof(float));
    });
}

// share of attention that crosses modalities (FlowMM eq. 6-7), from sampled queries, each weighted with the number of
// tokens of its modality that it stands for
static void build_flow(
        kvmerge_graph & graph, const kvmerge_engine & engine, const kvmerge_layer & layer, llama_seq_id seq_id,
        const std::vector<int32_t> & slots, const std::vector<uint32_t> & cells,
        const std::vector<kvmerge_plan> & plans, kvmerge_flow & flow, int32_t head, int32_t n_heads) {
    ggml_context * ctx = graph.ctx();

    const int64_t n      = cells.size();
    const int64_t n_rows = slots.size();

    ggml_tensor * a = build_logits(graph, engine, layer, slots, cells, head, n_heads);
    a = build_attention(graph, engine, layer, a, slots, plans, head, n_heads);

    // 1 where a cell is of a modality: the products are what each query gives to each modality
    constexpr int n_modalities = kvmerge_observer::n_modalities;

    std::vector<float> is_of(n*n_modalities*n_heads);
    for (int32_t h = 0; h < n_heads; ++h) {
        for (int64_t i = 0; i < n; ++i) {
            is_of[(h*n_modalities + plans[head + h].cells[i].modality)*n + i] = 1;
        }
    }

    const int64_t n_given = n_rows*(layer.n_head/layer.n_head_kv);

    a = ggml_reshape_3d(ctx, a, n, n_given, n_heads);
    a = ggml_mul_mat(ctx, a, graph.input(GGML_TYPE_F32, { n, n_modalities, n_heads }, is_of.data())); // [n_given, n_modalities, n_heads]
    ggml_prec_set_acc(a, GGML_PREC_F32);

    // rows and tokens of each modality
    std::vector<double> n_sampled(n_modalities);
    std::vector<double> weight   (n_modalities);

    double n_seen = 0;
    for (int m = 0; m < n_modalities; ++m) {
        n_seen += engine.observer.count(seq_id, m);
    }

    std::vector<uint8_t> modality(n_rows);
    for (int64_t j = 0; j < n_rows; ++j) {
        modality[j] = engine.observer.row(slots[j]).modality;
        n_sampled[modality[j]]++;
    }
    for (int m = 0; m < n_modalities; ++m) {
        if (n_sampled[m] > 0) {
            weight[m] = engine.observer.count(seq_id, m)/n_sampled[m]/n_seen/layer.n_head;
        }
    }

    graph.output(a, [&flow, modality, weight, n_rows, n_given](const std::vector<uint8_t> & bytes) {
        const float * given = reinterpret_cast<const float *>(bytes.data());

        for (size_t i = 0; i < bytes.size()/sizeof(float); ++i) {
            const uint8_t from = modality[i % n_given % n_rows];
            const int     to   = i/n_given % n_modalities;

            if (from != to) {
                const double part = given[i]*weight[from];

                flow.rho += part;
                (from == KVMERGE_TEXT ? flow.text_to_media : flow.media_to_text) += part;
            }
        }
    });
}

bool kvmerge_score_layer(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
              llama_seq_id            seq_id,
              int32_t                 n_seen,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans,
              kvmerge_flow          & flow) {
    const auto window  = engine.observer.window (seq_id, n_seen);
    const auto samples = engine.observer.samples(seq_id, n_seen);

    // as many KV heads at a time as the scratch allows
    const auto heads_at_once = [&](size_t n_rows) {
        const int64_t per_head = (int64_t) cells.size()*n_rows*(layer.n_head/layer.n_head_kv);

        return (int32_t) std::min<int64_t>(layer.n_head_kv, std::max<int64_t>(1, MAX_ELEMENTS/per_head));
    };

    const auto text = spread_text(engine.observer, samples, window.size());

    int32_t step = heads_at_once(window.size());
    for (int32_t h = 0; h < layer.n_head_kv; h += step) {
        if (graph.is_full() && !graph.run()) {
            return false;
        }
        build_importance(graph, engine, layer, window, text, cells, plans, h, std::min(step, layer.n_head_kv - h));
    }

    if (engine.params.value_norm) {
        for (int32_t h = 0; h < layer.n_head_kv; ++h) {
            if (graph.is_full() && !graph.run()) {
                return false;
            }
            build_value_norm(graph, engine, layer, cells, plans[h], h);
        }
    }

    if (!engine.measures_flow()) {
        flow.rho = -1;
        return true;
    }

    int n_present = 0;
    for (int m = 0; m < kvmerge_observer::n_modalities; ++m) {
        n_present += engine.observer.count(seq_id, m) > 0;
    }

    // with one modality nothing can cross
    if (n_present > 1 && !samples.empty()) {
        step = heads_at_once(samples.size());
        for (int32_t h = 0; h < layer.n_head_kv; h += step) {
            if (graph.is_full() && !graph.run()) {
                return false;
            }
            build_flow(graph, engine, layer, seq_id, samples, cells, plans, flow, h, std::min(step, layer.n_head_kv - h));
        }
    }

    return true;
}

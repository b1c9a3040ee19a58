#include "kvmerge-score.h"

#include "kvmerge-attend.h"
#include "kvmerge-keys.h"
#include "kvmerge-sums.h"
#include "kvmerge-values.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// scratch for the attention weights of one piece of the graph
static constexpr int64_t MAX_ELEMENTS = 8*1024*1024;

static constexpr int n_modalities = kvmerge_observer::n_modalities;

// K of the given cells, for n_heads KV heads from `head` on: [n_embd_head_k, n, n_heads]
static ggml_tensor * build_keys(kvmerge_graph & graph, const kvmerge_layer & layer, const std::vector<uint32_t> & cells, int32_t head, int32_t n_heads) {
    ggml_context * ctx = graph.ctx();

    const int64_t n = cells.size();
    const size_t  row = ggml_row_size(layer.k->type, layer.n_embd_head_k);

    if (cells.back() - cells.front() + 1 == (uint32_t) n) {
        return ggml_view_3d(ctx, layer.k, layer.n_embd_head_k, n, n_heads, layer.k->nb[1], row, cells.front()*layer.k->nb[1] + head*row);
    }

    std::vector<int32_t> rows;
    rows.reserve(n*n_heads);
    for (int32_t h = head; h < head + n_heads; ++h) {
        for (uint32_t idx : cells) {
            rows.push_back(kvmerge_key_row(layer, idx, h));
        }
    }

    return ggml_reshape_3d(ctx, kvmerge_build_key_rows(graph, layer, rows), layer.n_embd_head_k, n, n_heads);
}

ggml_tensor * kvmerge_build_logits(
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

ggml_tensor * kvmerge_build_attention(
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

// logits of n_group*n_rows queries for each KV head, put after those that the plans have
static void output_logits(kvmerge_graph & graph, ggml_tensor * kq, std::vector<kvmerge_plan> & plans, int32_t head, int32_t n_heads) {
    const int64_t n         = kq->ne[0];
    const int64_t n_queries = kq->ne[1]*kq->ne[2]/n_heads;

    graph.output(kq, [&plans, n, n_queries, head, n_heads](const std::vector<uint8_t> & bytes) {
        const float * logits = reinterpret_cast<const float *>(bytes.data());

        for (int32_t h = head; h < head + n_heads; ++h) {
            auto & plan = plans[h];

            const int32_t first = plan.n_queries;
            plan.add_queries(n_queries);

            for (int32_t q = first; q < plan.n_queries; ++q) {
                for (int64_t i = 0; i < n; ++i) {
                    plan.logit(q, i) = *logits++;
                }
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

std::vector<int32_t> kvmerge_fitted_text(const kvmerge_engine & engine, llama_seq_id seq_id, int32_t n_seen) {
    if (!kvmerge_needs_logits(engine.params)) {
        return {};
    }

    const auto & observer = engine.observer;

    return spread_text(observer, observer.samples(seq_id, n_seen), observer.window(seq_id, n_seen).size());
}

bool kvmerge_needs_logits(const kvmerge_params & params) {
    return params.bias == KVMERGE_BIAS_FIT;
}

// I(i): what the proxy queries give to cell i, summed over queries and the group's heads (FlowMM eq. 8)
static void build_importance(
        kvmerge_graph & graph, const kvmerge_engine & engine, const kvmerge_layer & layer,
        const std::vector<int32_t> & slots, const std::vector<int32_t> & text, const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan> & plans, int32_t head, int32_t n_heads) {
    ggml_context * ctx = graph.ctx();

    const int64_t n = cells.size();

    ggml_tensor * kq = kvmerge_build_logits(graph, engine, layer, slots, cells, head, n_heads);

    if (kvmerge_needs_logits(engine.params)) {
        output_logits(graph, kq, plans, head, n_heads);

        if (!text.empty()) {
            output_logits(graph, kvmerge_build_logits(graph, engine, layer, text, cells, head, n_heads), plans, head, n_heads);
        }
    }

    ggml_tensor * a = kvmerge_build_attention(graph, engine, layer, kq, slots, plans, head, n_heads);

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

// what each query in `slots` gives to each modality, summed over its heads
static void build_modalities(
        kvmerge_graph & graph, const kvmerge_engine & engine, const kvmerge_layer & layer, const std::vector<int32_t> & slots,
        const std::vector<uint32_t> & cells, const std::vector<kvmerge_plan> & plans, std::vector<double> & given, int32_t head, int32_t n_heads) {
    ggml_context * ctx = graph.ctx();

    const int64_t n      = cells.size();
    const int64_t n_rows = slots.size();

    ggml_tensor * a = kvmerge_build_logits(graph, engine, layer, slots, cells, head, n_heads);
    a = kvmerge_build_attention(graph, engine, layer, a, slots, plans, head, n_heads);

    // 1 where a cell is of a modality: the products are what each query gives to each modality
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

    graph.output(a, [&given, n_rows, n_given](const std::vector<uint8_t> & bytes) {
        const float * parts = reinterpret_cast<const float *>(bytes.data());

        for (size_t i = 0; i < bytes.size()/sizeof(float); ++i) {
            given[i % n_given % n_rows*n_modalities + i/n_given % n_modalities] += parts[i];
        }
    });
}

// share of attention that crosses modalities (FlowMM eq. 6-7), from sampled queries, each weighted with the number of
// tokens of its modality that it stands for
static kvmerge_flow make_flow(
        const kvmerge_observer & observer, llama_seq_id seq_id, int32_t n_head, const std::vector<int32_t> & slots,
        const std::vector<double> & given) {
    double n_sampled[n_modalities] = {};
    for (int32_t slot : slots) {
        n_sampled[observer.row(slot).modality]++;
    }

    double n_seen = 0;
    for (int m = 0; m < n_modalities; ++m) {
        n_seen += observer.count(seq_id, m);
    }

    kvmerge_flow flow;

    for (size_t j = 0; j < slots.size(); ++j) {
        const int    from   = observer.row(slots[j]).modality;
        const double weight = observer.count(seq_id, from)/n_sampled[from]/n_seen/n_head;

        for (int to = 0; to < n_modalities; ++to) {
            if (from != to) {
                const double part = given[j*n_modalities + to]*weight;

                flow.rho += part;
                (from == KVMERGE_TEXT ? flow.text_to_media : flow.media_to_text) += part;
            }
        }
    }

    return flow;
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

    const auto text    = kvmerge_fitted_text(engine, seq_id, n_seen);

    int n_present = 0;
    for (int m = 0; m < n_modalities; ++m) {
        n_present += engine.observer.count(seq_id, m) > 0;
    }

    // with one modality nothing can cross
    const auto rows = engine.measures_flow() && n_present > 1 ? samples : std::vector<int32_t> {};

    std::vector<double> given(rows.size()*n_modalities); // by them to each modality

    // build(head, n_heads) for as many KV heads at a time as the scratch allows
    const auto for_heads = [&](size_t n_rows, const auto & build) {
        const int64_t per_head = (int64_t) cells.size()*n_rows*(layer.n_head/layer.n_head_kv);
        const int32_t step     = std::min<int64_t>(layer.n_head_kv, std::max<int64_t>(1, MAX_ELEMENTS/per_head));

        for (int32_t h = 0; h < layer.n_head_kv; h += step) {
            if (graph.is_full() && !graph.run()) {
                return false;
            }
            build(h, std::min(step, layer.n_head_kv - h));
        }

        return graph.run();
    };

    const auto importance = [&](int32_t h, int32_t n_heads) {
        build_importance(graph, engine, layer, window, text, cells, plans, h, n_heads);
    };
    const auto modalities = [&](int32_t h, int32_t n_heads) {
        build_modalities(graph, engine, layer, rows, cells, plans, given, h, n_heads);
    };
    const auto value_norm = [&](int32_t h, int32_t /*n_heads*/) {
        build_value_norm(graph, engine, layer, cells, plans[h], h);
    };

    bool ok;
    if (kvmerge_can_attend(engine, layer)) {
        ok = kvmerge_attend(graph, engine, layer, window, text, rows, cells, plans, given);
    } else {
        ok = for_heads(window.size(), importance) && (rows.empty() || for_heads(rows.size(), modalities));
    }

    if (ok && engine.params.value_norm) {
        ok = for_heads(MAX_ELEMENTS, value_norm); // one at a time
    }
    if (!ok) {
        return false;
    }

    if (!engine.measures_flow()) {
        flow.rho = -1;
    } else if (!rows.empty()) {
        flow = make_flow(engine.observer, seq_id, layer.n_head, rows, given);
    }

    return true;
}

#include "kvmerge-attend.h"

#include "kvmerge-host.h"
#include "kvmerge-keys.h"
#include "kvmerge-parallel.h"
#include "kvmerge-vectors.h"

#include <algorithm>
#include <functional>
#include <limits>

// scratch for the keys of one piece of the graph
static constexpr int64_t MAX_ELEMENTS = 1024*1024;

// keys whose logits stay in the cache of a core
static constexpr int64_t N_BLOCK = 96;

static constexpr int n_modalities = kvmerge_observer::n_modalities;

namespace {

struct attend_query {
    const float * q     = nullptr; // [d]
    int32_t       order = -1;      // of its token: it sees the cells up to it
};

// queries side by side, those beyond the last are zeros that see nothing
struct attend_tile {
    kvmerge_aligned_floats q; // [d][KVMERGE_TILE], scaled
    int32_t order[KVMERGE_TILE];
    int32_t n;

    attend_tile(const std::vector<attend_query> & queries, size_t first, int64_t d, float scale) :
        q(d*KVMERGE_TILE), n(std::min<size_t>(KVMERGE_TILE, queries.size() - first)) {
        std::fill(order, order + KVMERGE_TILE, -1);

        for (int32_t l = 0; l < n; ++l) {
            order[l] = queries[first + l].order;

            for (int64_t e = 0; e < d; ++e) {
                q.data()[e*KVMERGE_TILE + l] = scale*queries[first + l].q[e];
            }
        }
    }
};

// the cells of a KV head
struct attend_cells {
    int64_t n;
    int64_t d;

    const kvmerge_cell * cell;  // [n]
    const kvmerge_cell * first; // [n] of the layer's first head, whose order counts for all
    kvmerge_keys_of_head keys;
};

} // namespace

// dst[i][l]: product of key first + i with query l of the tile
template <typename vec_f>
KVMERGE_INLINE void products(const float * tile, const attend_cells & cells, int64_t first, int64_t last, float * dst) {
    constexpr int N_VECS = KVMERGE_TILE*sizeof(float)/sizeof(vec_f);
    constexpr int N_ROWS = 12/N_VECS > 0 ? 12/N_VECS : 1; // their sums fill the registers

    for (int64_t i = first; i < last; i += N_ROWS) {
        const float * row[N_ROWS];
        for (int r = 0; r < N_ROWS; ++r) {
            row[r] = cells.keys[std::min(i + r, last - 1)];
        }

        vec_f sum[N_ROWS][N_VECS] = {};

        for (int64_t e = 0; e < cells.d; ++e) {
            vec_f x[N_VECS];
            memcpy(x, tile + e*KVMERGE_TILE, sizeof(x));

            for (int r = 0; r < N_ROWS; ++r) {
                for (int c = 0; c < N_VECS; ++c) {
                    sum[r][c] += row[r][e]*x[c];
                }
            }
        }

        for (int r = 0; r < N_ROWS && i + r < last; ++r) {
            memcpy(dst + (i + r - first)*KVMERGE_TILE, sum[r], sizeof(sum[r]));
        }
    }
}

// logits of the cell for queries that see it, -INFINITY for the others
template <typename vec_f, typename vec_i>
KVMERGE_INLINE void seen(const float * logits, float bias, int32_t order, const vec_i & last, vec_f & x) {
    memcpy(&x, logits, sizeof(x));

    x = vec_i {} + order <= last ? x + bias : vec_f {} - std::numeric_limits<float>::infinity();
}

// where nothing was seen: any maximum makes all weights 0
template <typename vec_f>
KVMERGE_INLINE void make_finite(vec_f & max) {
    max = max == vec_f {} - std::numeric_limits<float>::infinity() ? vec_f {} : max;
}

// logits [n][KVMERGE_TILE] of the tile; the attention that its queries give, added to score [n]
template <typename vec_f, typename vec_i>
KVMERGE_INLINE void attend_importance(attend_tile & tile, const attend_cells & cells, float * logits, float * score) {
    constexpr int N_VECS  = KVMERGE_TILE*sizeof(float)/sizeof(vec_f);
    constexpr int N_LANES = KVMERGE_TILE/N_VECS;

    products<vec_f>(tile.q.data(), cells, 0, cells.n, logits);

    if (*std::max_element(tile.order, tile.order + KVMERGE_TILE) < 0) {
        return;
    }

    for (int c = 0; c < N_VECS; ++c) {
        vec_i last;
        memcpy(&last, tile.order + c*N_LANES, sizeof(last));

        vec_f x;
        vec_f max = vec_f {} - std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < cells.n; ++i) {
            seen(logits + i*KVMERGE_TILE + c*N_LANES, cells.cell[i].bias, cells.first[i].order, last, x);
            kvmerge_max(max, x);
        }
        make_finite(max);

        vec_f sum = {};
        for (int64_t i = 0; i < cells.n; ++i) {
            seen(logits + i*KVMERGE_TILE + c*N_LANES, cells.cell[i].bias, cells.first[i].order, last, x);
            x -= max;
            kvmerge_exp(x);
            sum += x;
        }

        // queries that see nothing give nothing
        const vec_f part = sum > vec_f {} ? 1.0f/sum : vec_f {};

        for (int64_t i = 0; i < cells.n; ++i) {
            seen(logits + i*KVMERGE_TILE + c*N_LANES, cells.cell[i].bias, cells.first[i].order, last, x);
            x -= max;
            kvmerge_exp(x);
            x *= part;

            float lanes[N_LANES];
            memcpy(lanes, &x, sizeof(lanes));
            for (int l = 0; l < N_LANES; ++l) {
                score[i] += lanes[l];
            }
        }
    }
}

// given [KVMERGE_TILE][n_modalities]: what the queries of the tile give to each modality
template <typename vec_f, typename vec_i>
KVMERGE_INLINE void attend_modalities(attend_tile & tile, const attend_cells & cells, float * given) {
    constexpr int N_VECS  = KVMERGE_TILE*sizeof(float)/sizeof(vec_f);
    constexpr int N_LANES = KVMERGE_TILE/N_VECS;

    // of the queries; those that fill up the tile may see what they like
    const int32_t last_order  = *std::max_element(tile.order, tile.order + KVMERGE_TILE);
    const int32_t first_order = *std::min_element(tile.order, tile.order + tile.n);

    alignas(64) float logits[N_BLOCK*KVMERGE_TILE];

    vec_i last[N_VECS];
    memcpy(last, tile.order, sizeof(last));

    vec_f max[N_VECS];
    vec_f sum[n_modalities][N_VECS] = {};
    for (int c = 0; c < N_VECS; ++c) {
        max[c] = vec_f {} - std::numeric_limits<float>::infinity();
    }

    for (int64_t i0 = 0; i0 < cells.n; i0 += N_BLOCK) {
        const int64_t i1 = std::min(i0 + N_BLOCK, cells.n);

        const auto is_after = [&](int32_t order) { return [order](const auto & cell) { return cell.order > order; }; };

        // most blocks lie in the future of all queries of a tile, or in the past of all
        if (std::all_of(cells.first + i0, cells.first + i1, is_after(last_order))) {
            continue;
        }

        const bool all_see = std::none_of(cells.first + i0, cells.first + i1, is_after(first_order));

        products<vec_f>(tile.q.data(), cells, i0, i1, logits);

        for (int c = 0; c < N_VECS; ++c) {
            vec_f shrink = max[c];
            make_finite(shrink);

            vec_f x;
            for (int64_t i = i0; i < i1; ++i) {
                float * logit = logits + (i - i0)*KVMERGE_TILE + c*N_LANES;

                if (all_see) {
                    memcpy(&x, logit, sizeof(x));
                    x += cells.cell[i].bias;
                } else {
                    seen(logit, cells.cell[i].bias, cells.first[i].order, last[c], x);
                }

                memcpy(logit, &x, sizeof(x));
                kvmerge_max(max[c], x);
            }

            vec_f now = max[c];
            make_finite(now);

            shrink -= now;
            kvmerge_exp(shrink);
            for (int m = 0; m < n_modalities; ++m) {
                sum[m][c] *= shrink;
            }

            for (int64_t i = i0; i < i1; ++i) {
                memcpy(&x, logits + (i - i0)*KVMERGE_TILE + c*N_LANES, sizeof(x));
                x -= now;
                kvmerge_exp(x);
                sum[cells.cell[i].modality][c] += x;
            }
        }
    }

    float lanes[n_modalities][KVMERGE_TILE];
    memcpy(lanes, sum, sizeof(lanes));

    for (int l = 0; l < KVMERGE_TILE; ++l) {
        float all = 0;
        for (int m = 0; m < n_modalities; ++m) {
            all += lanes[m][l];
        }
        for (int m = 0; m < n_modalities; ++m) {
            given[l*n_modalities + m] = all > 0 ? lanes[m][l]/all : 0;
        }
    }
}

KVMERGE_FOR_EACH_WIDTH(compute_importance, attend_importance,
        (attend_tile & tile, const attend_cells & cells, float * logits, float * score), (tile, cells, logits, score))

KVMERGE_FOR_EACH_WIDTH(compute_modalities, attend_modalities,
        (attend_tile & tile, const attend_cells & cells, float * given), (tile, cells, given))

bool kvmerge_can_attend(const kvmerge_engine & engine, const kvmerge_layer & layer) {
#if defined(KVMERGE_VECTORS)
    return kvmerge_is_host(layer.k) && kvmerge_is_host(layer.q) && engine.logit_softcap == 0.0f && !layer.sinks;
#else
    GGML_UNUSED(engine);
    GGML_UNUSED(layer);

    return false;
#endif
}

// queries of the slots, one head of the group after the other
static std::vector<attend_query> make_queries(
        const kvmerge_engine & engine, const kvmerge_layer & layer, int32_t head, const std::vector<int32_t> & slots) {
    const int32_t n_group = layer.n_head/layer.n_head_kv;

    std::vector<attend_query> res;

    for (int32_t g = 0; g < n_group; ++g) {
        for (int32_t slot : slots) {
            const float * row = reinterpret_cast<const float *>(static_cast<const char *>(layer.q->data) + slot*layer.q->nb[1]);

            res.push_back({ row + (head*n_group + g)*layer.n_embd_head_k, engine.observer.row(slot).order });
        }
    }

    return res;
}

static int32_t count_tiles(const std::vector<attend_query> & queries) {
    return (queries.size() + KVMERGE_TILE - 1)/KVMERGE_TILE;
}

bool kvmerge_attend(
              kvmerge_graph         & graph,
        const kvmerge_engine        & engine,
        const kvmerge_layer         & layer,
        const std::vector<int32_t>  & window,
        const std::vector<int32_t>  & text,
        const std::vector<int32_t>  & flow,
        const std::vector<uint32_t> & cells,
        std::vector<kvmerge_plan>   & plans,
        std::vector<double>         & given) {
    const int64_t n = cells.size();
    const int64_t d = layer.n_embd_head_k;

    struct attend_head {
        std::vector<attend_query> important; // window, then text
        std::vector<attend_query> crossing;  // flow

        std::vector<std::vector<float>> scores; // of each tile of the important
        std::vector<std::vector<float>> given;  // of each tile of the crossing
    };

    // as many KV heads at a time as the scratch allows
    const int32_t step = std::min<int64_t>(layer.n_head_kv, std::max<int64_t>(1, MAX_ELEMENTS/(n*d)));

    for (int32_t h0 = 0; h0 < layer.n_head_kv; h0 += step) {
        std::vector<attend_head> heads(std::min(step, layer.n_head_kv - h0));

        for (size_t i = 0; i < heads.size(); ++i) {
            const int32_t h = h0 + i;

            auto & head = heads[i];
            auto & plan = plans[h];

            head.important = make_queries(engine, layer, h, window);
            head.crossing  = make_queries(engine, layer, h, flow);

            plan.n_proxies = head.important.size();

            for (auto query : make_queries(engine, layer, h, text)) {
                query.order = -1; // for its logits only
                head.important.push_back(query);
            }

            plan.add_queries(head.important.size());

            head.scores.assign(count_tiles(head.important), std::vector<float>(n));
            head.given .assign(count_tiles(head.crossing),  std::vector<float>(KVMERGE_TILE*n_modalities));
        }

        const int32_t n_important = heads[0].scores.size();
        const int32_t n_tiles     = heads[0].given .size() + n_important;

        const auto compute = [&](int i, const float * keys) {
            const int32_t t = i % n_tiles;

            auto & head = heads[i/n_tiles];
            auto & plan = plans[h0 + i/n_tiles];

            const attend_cells of_head = { n, d, plan.cells.data(), plans[0].cells.data(), { keys, i/n_tiles, (int32_t) heads.size(), d } };

            if (t < n_important) {
                attend_tile tile(head.important, t*KVMERGE_TILE, d, layer.kq_scale);
                compute_importance(tile, of_head, plan.tile(t), head.scores[t].data());
            } else {
                attend_tile tile(head.crossing, (t - n_important)*KVMERGE_TILE, d, layer.kq_scale);
                compute_modalities(tile, of_head, head.given[t - n_important].data());
            }
        };

        if (!kvmerge_parallel(graph, kvmerge_build_keys_of_heads(graph, layer, h0, heads.size(), cells), heads.size()*n_tiles, compute)) {
            return false;
        }

        for (size_t i = 0; i < heads.size(); ++i) {
            const auto & head  = heads[i];
            auto       & score = plans[h0 + i].score;

            score.assign(n, 0.0f);
            for (const auto & part : head.scores) {
                std::transform(score.begin(), score.end(), part.begin(), score.begin(), std::plus<float>());
            }

            for (size_t q = 0; q < head.crossing.size(); ++q) {
                for (int m = 0; m < n_modalities; ++m) {
                    given[q % flow.size()*n_modalities + m] += head.given[q/KVMERGE_TILE][q % KVMERGE_TILE*n_modalities + m];
                }
            }
        }
    }

    return true;
}

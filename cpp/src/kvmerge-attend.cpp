#include "kvmerge-attend.h"

#include "kvmerge-host.h"
#include "kvmerge-keys.h"
#include "kvmerge-parallel.h"
#include "kvmerge-vectors.h"

#include <algorithm>
#include <functional>
#include <limits>

// keys that stay in the cache of a core, with their logits
static constexpr int64_t N_BLOCK = 96;

// tiles that share the reading of keys: more would leave threads without work
static constexpr int32_t N_TILES = 4;

static constexpr int n_modalities = kvmerge_observer::n_modalities;

namespace {

struct attend_query {
    const float * q     = nullptr; // [d]
    int32_t       order = -1;      // of its token: it sees the cells up to it
};

// the cells of a KV head
struct attend_cells {
    int64_t n;

    const kvmerge_cell * cell;  // [n]
    const kvmerge_cell * first; // [n] of the layer's first head, whose order counts for all
    kvmerge_keys_of_head keys;
};

// queries side by side, those beyond the last are zeros that see nothing
struct attend_tile {
    kvmerge_aligned_floats q; // [d][KVMERGE_TILE], scaled
    int32_t order[KVMERGE_TILE];
    int32_t n;

    // where their importance is asked for
    float * logits; // [n][KVMERGE_TILE], nullptr: what they give to modalities is asked for
    float * score;  // [n] attention of all of them

    // else
    float * given;                            // [KVMERGE_TILE][n_modalities]
    float   max[KVMERGE_TILE];                // of the blocks so far
    float   sum[n_modalities][KVMERGE_TILE];  // of e^(logit less max)

    attend_tile(const std::vector<attend_query> & queries, int32_t t, int64_t d, float scale, float * logits, float * score, float * given) :
        q(d*KVMERGE_TILE), n(std::min<size_t>(KVMERGE_TILE, queries.size() - t*KVMERGE_TILE)), logits(logits), score(score), given(given), sum {} {
        std::fill(order, order + KVMERGE_TILE, -1);
        std::fill(max,   max   + KVMERGE_TILE, -std::numeric_limits<float>::infinity());

        for (int32_t l = 0; l < n; ++l) {
            const auto & query = queries[t*KVMERGE_TILE + l];

            order[l] = query.order;

            for (int64_t e = 0; e < d; ++e) {
                q.data()[e*KVMERGE_TILE + l] = scale*query.q[e];
            }
        }
    }
};

} // namespace

// dst[i][l]: product of key i with query l of the tile
template <typename vec_f>
KVMERGE_INLINE void products(const float * tile, const float * keys, int64_t n, int64_t d, float * dst) {
    constexpr int N_VECS = KVMERGE_TILE*sizeof(float)/sizeof(vec_f);
    constexpr int N_ROWS = 12/N_VECS > 0 ? 12/N_VECS : 1; // their sums fill the registers

    for (int64_t i = 0; i < n; i += N_ROWS) {
        const float * row[N_ROWS];
        vec_f sum[N_ROWS][N_VECS];

        for (int r = 0; r < N_ROWS; ++r) {
            row[r] = keys + std::min(i + r, n - 1)*d;

            for (int c = 0; c < N_VECS; ++c) {
                sum[r][c] = vec_f {};
            }
        }

        for (int64_t e = 0; e < d; ++e) {
            vec_f x[N_VECS];
            memcpy(x, tile + e*KVMERGE_TILE, sizeof(x));

            for (int r = 0; r < N_ROWS; ++r) {
                for (int c = 0; c < N_VECS; ++c) {
                    sum[r][c] += row[r][e]*x[c];
                }
            }
        }

        for (int r = 0; r < N_ROWS && i + r < n; ++r) {
            memcpy(dst + (i + r)*KVMERGE_TILE, sum[r], sizeof(sum[r]));
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

// the attention that the queries of the tile give, added to its score
template <typename vec_f, typename vec_i>
KVMERGE_INLINE void add_importance(const attend_tile & tile, const attend_cells & cells) {
    constexpr int N_VECS  = KVMERGE_TILE*sizeof(float)/sizeof(vec_f);
    constexpr int N_LANES = KVMERGE_TILE/N_VECS;

    if (*std::max_element(tile.order, tile.order + KVMERGE_TILE) < 0) {
        return;
    }

    for (int c = 0; c < N_VECS; ++c) {
        vec_i last;
        memcpy(&last, tile.order + c*N_LANES, sizeof(last));

        vec_f x;
        vec_f max = vec_f {} - std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < cells.n; ++i) {
            seen(tile.logits + i*KVMERGE_TILE + c*N_LANES, cells.cell[i].bias, cells.first[i].order, last, x);
            kvmerge_max(max, x);
        }
        make_finite(max);

        vec_f sum = {};
        for (int64_t i = 0; i < cells.n; ++i) {
            seen(tile.logits + i*KVMERGE_TILE + c*N_LANES, cells.cell[i].bias, cells.first[i].order, last, x);
            x -= max;
            kvmerge_exp(x);
            sum += x;
        }

        // queries that see nothing give nothing
        const vec_f part = sum > vec_f {} ? 1.0f/sum : vec_f {};

        for (int64_t i = 0; i < cells.n; ++i) {
            seen(tile.logits + i*KVMERGE_TILE + c*N_LANES, cells.cell[i].bias, cells.first[i].order, last, x);
            x -= max;
            kvmerge_exp(x);
            x *= part;

            float lanes[N_LANES];
            memcpy(lanes, &x, sizeof(lanes));
            for (int l = 0; l < N_LANES; ++l) {
                tile.score[i] += lanes[l];
            }
        }
    }
}

// what the queries of the tile give to the modalities of cells i0 to i1
template <typename vec_f, typename vec_i>
KVMERGE_INLINE void add_modalities(attend_tile & tile, const attend_cells & cells, const float * keys, int64_t i0, int64_t i1) {
    constexpr int N_VECS  = KVMERGE_TILE*sizeof(float)/sizeof(vec_f);
    constexpr int N_LANES = KVMERGE_TILE/N_VECS;

    // of the queries; those that fill up the tile may see what they like
    const int32_t last_order  = *std::max_element(tile.order, tile.order + KVMERGE_TILE);
    const int32_t first_order = *std::min_element(tile.order, tile.order + tile.n);

    const auto is_after = [&](int32_t order) { return [order](const auto & cell) { return cell.order > order; }; };

    // most blocks lie in the future of all queries of a tile, or in the past of all
    if (std::all_of(cells.first + i0, cells.first + i1, is_after(last_order))) {
        return;
    }

    const bool all_see = std::none_of(cells.first + i0, cells.first + i1, is_after(first_order));

    alignas(64) float logits[N_BLOCK*KVMERGE_TILE];

    products<vec_f>(tile.q.data(), keys, i1 - i0, cells.keys.rows.d, logits);

    for (int l = 0; l < KVMERGE_TILE; l += N_LANES) {
        vec_i last;
        memcpy(&last, tile.order + l, sizeof(last));

        vec_f now;
        memcpy(&now, tile.max + l, sizeof(now));

        vec_f shrink = now;
        make_finite(shrink);

        vec_f x;
        for (int64_t i = i0; i < i1; ++i) {
            float * logit = logits + (i - i0)*KVMERGE_TILE + l;

            if (all_see) {
                memcpy(&x, logit, sizeof(x));
                x += cells.cell[i].bias;
            } else {
                seen(logit, cells.cell[i].bias, cells.first[i].order, last, x);
            }

            memcpy(logit, &x, sizeof(x));
            kvmerge_max(now, x);
        }

        memcpy(tile.max + l, &now, sizeof(now));
        make_finite(now);

        shrink -= now;
        kvmerge_exp(shrink);

        vec_f sum[n_modalities];
        for (int m = 0; m < n_modalities; ++m) {
            memcpy(&sum[m], tile.sum[m] + l, sizeof(sum[m]));
            sum[m] *= shrink;
        }

        for (int64_t i = i0; i < i1; ++i) {
            memcpy(&x, logits + (i - i0)*KVMERGE_TILE + l, sizeof(x));
            x -= now;
            kvmerge_exp(x);
            sum[cells.cell[i].modality] += x;
        }

        for (int m = 0; m < n_modalities; ++m) {
            memcpy(tile.sum[m] + l, &sum[m], sizeof(sum[m]));
        }
    }
}

static void finish_modalities(const attend_tile & tile) {
    for (int l = 0; l < KVMERGE_TILE; ++l) {
        float all = 0;
        for (int m = 0; m < n_modalities; ++m) {
            all += tile.sum[m][l];
        }
        for (int m = 0; m < n_modalities; ++m) {
            tile.given[l*n_modalities + m] = all > 0 ? tile.sum[m][l]/all : 0;
        }
    }
}

template <typename vec_f, typename vec_i>
KVMERGE_INLINE void attend_tiles(std::vector<attend_tile> & tiles, const attend_cells & cells) {
    constexpr int64_t N_AHEAD = 16;

    const int64_t d = cells.keys.rows.d;

    std::vector<float> keys(N_BLOCK*d);

    for (int64_t i0 = 0; i0 < cells.n; i0 += N_BLOCK) {
        const int64_t i1 = std::min(i0 + N_BLOCK, cells.n);

        for (int64_t i = i0; i < i1; ++i) {
            kvmerge_prefetch_row(cells.keys.rows, cells.keys.row(std::min(i + N_AHEAD, cells.n - 1)));
            kvmerge_read_row(cells.keys.rows, cells.keys.row(i), keys.data() + (i - i0)*d);
        }

        for (auto & tile : tiles) {
            if (tile.logits) {
                products<vec_f>(tile.q.data(), keys.data(), i1 - i0, d, tile.logits + i0*KVMERGE_TILE);
            } else {
                add_modalities<vec_f, vec_i>(tile, cells, keys.data(), i0, i1);
            }
        }
    }

    for (auto & tile : tiles) {
        if (tile.logits) {
            add_importance<vec_f, vec_i>(tile, cells);
        } else {
            finish_modalities(tile);
        }
    }
}

KVMERGE_FOR_EACH_WIDTH(compute_tiles, attend_tiles, (std::vector<attend_tile> & tiles, const attend_cells & cells), (tiles, cells))

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

    struct attend_head {
        std::vector<attend_query> important; // window, then text
        std::vector<attend_query> crossing;  // flow

        std::vector<std::vector<float>> scores; // of each tile of the important
        std::vector<std::vector<float>> given;  // of each tile of the crossing
    };

    std::vector<attend_head> heads(layer.n_head_kv);

    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        auto & head = heads[h];
        auto & plan = plans[h];

        head.important = make_queries(engine, layer, h, window);
        head.crossing  = make_queries(engine, layer, h, flow);

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
    const int32_t n_parts     = (n_tiles + N_TILES - 1)/N_TILES; // of a head

    const auto compute = [&](int i) {
        const int32_t h = i/n_parts;

        auto & head = heads[h];
        auto & plan = plans[h];

        std::vector<attend_tile> tiles;
        tiles.reserve(N_TILES);

        for (int32_t t = i % n_parts*N_TILES; t < std::min(n_tiles, (i % n_parts + 1)*N_TILES); ++t) {
            if (t < n_important) {
                tiles.emplace_back(head.important, t, layer.n_embd_head_k, layer.kq_scale, plan.tile(t), head.scores[t].data(), nullptr);
            } else {
                tiles.emplace_back(head.crossing, t - n_important, layer.n_embd_head_k, layer.kq_scale, nullptr, nullptr, head.given[t - n_important].data());
            }
        }

        compute_tiles(tiles, { n, plan.cells.data(), plans[0].cells.data(), { layer, cells, h } });
    };

    if (!kvmerge_parallel(graph, layer.n_head_kv*n_parts, compute)) {
        return false;
    }

    for (int32_t h = 0; h < layer.n_head_kv; ++h) {
        const auto & head  = heads[h];
        auto       & score = plans[h].score;

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

    return true;
}

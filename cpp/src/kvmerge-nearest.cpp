#include "kvmerge-nearest.h"

#include "kvmerge-vectors.h"

#include <algorithm>
#include <cmath>

// The pivots are transposed into tiles of N_VECS vectors, value by value, so that every lane of a vector belongs to
// another pivot: its products add up in place, and so does its maximum. N_ROWS keys share the loads of a tile; their
// products with it are what fills the registers.
template <typename vec_f>
struct tile_shape {
    static constexpr int N_ROWS = sizeof(vec_f) == 64 ? 8 : 6;
    static constexpr int N_VECS = sizeof(vec_f) == 64 ? 3 : 2;

    static constexpr int64_t N_LANES = sizeof(vec_f)/sizeof(float);
    static constexpr int64_t N_TILE  = N_LANES*N_VECS;
};

// the pivots into tiles; row: room for one key
template <typename vec_f>
KVMERGE_INLINE void fill_tiles(const kvmerge_keys_of_head & keys, const std::vector<int32_t> & pivots, int64_t n_tiles, float * row, float * tile) {
    constexpr int64_t N_TILE = tile_shape<vec_f>::N_TILE;

    const int64_t d        = keys.rows.d;
    const int64_t n_pivots = pivots.size();

    for (int64_t p = 0; p < n_tiles*N_TILE; ++p) {
        // the last tile is filled up with the last pivot
        if (p < n_pivots) {
            kvmerge_prefetch_row(keys.rows, keys.row(pivots[std::min(p + N_TILE, n_pivots - 1)]));
            kvmerge_read_row(keys.rows, keys.row(pivots[p]), row);
        }

        for (int64_t e = 0; e < d; ++e) {
            tile[(p/N_TILE*d + e)*N_TILE + p % N_TILE] = row[e];
        }
    }
}

// the pivots of a tile become unit vectors; the norm of the evicted key does not change which of them is nearest
template <typename vec_f>
KVMERGE_INLINE void normalize_tile(vec_f * x, int64_t d) {
    constexpr int     N_VECS  = tile_shape<vec_f>::N_VECS;
    constexpr int64_t N_LANES = tile_shape<vec_f>::N_LANES;

    for (int c = 0; c < N_VECS; ++c) {
        vec_f sum = {};
        for (int64_t e = 0; e < d; ++e) {
            sum += x[e*N_VECS + c]*x[e*N_VECS + c];
        }

        float lanes[N_LANES];
        memcpy(lanes, &sum, sizeof(sum));
        for (float & lane : lanes) {
            lane = 1.0f/std::max(std::sqrt(lane), 1e-12f);
        }

        vec_f scale;
        memcpy(&scale, lanes, sizeof(scale));
        for (int64_t e = 0; e < d; ++e) {
            x[e*N_VECS + c] *= scale;
        }
    }
}

// the pivot that the lanes have found; of equal products the last counts, as in ggml_argmax
template <typename vec_f, typename vec_i>
KVMERGE_INLINE int32_t best_lane(const vec_f & best, const vec_i & where) {
    constexpr int64_t N_LANES = tile_shape<vec_f>::N_LANES;

    float   max = -INFINITY;
    int32_t idx = 0;

    float   lane_best [N_LANES];
    int32_t lane_where[N_LANES];
    memcpy(lane_best,  &best,  sizeof(lane_best));
    memcpy(lane_where, &where, sizeof(lane_where));

    for (int l = 0; l < N_LANES; ++l) {
        const int32_t cur = lane_where[l]*N_LANES + l;

        if (lane_best[l] > max || (lane_best[l] == max && cur > idx)) {
            max = lane_best[l];
            idx = cur;
        }
    }

    return idx;
}

template <typename vec_f, typename vec_i>
KVMERGE_INLINE void find_nearest(const kvmerge_keys_of_head & keys, const std::vector<int32_t> & pivots, const int32_t * evicted, int64_t n, int32_t * nearest) {
    constexpr int     N_ROWS = tile_shape<vec_f>::N_ROWS;
    constexpr int     N_VECS = tile_shape<vec_f>::N_VECS;
    constexpr int64_t N_TILE = tile_shape<vec_f>::N_TILE;

    const int64_t d        = keys.rows.d;
    const int64_t n_pivots = pivots.size();
    const int64_t n_tiles  = (n_pivots + N_TILE - 1)/N_TILE;

    kvmerge_aligned_floats tiles(n_tiles*N_TILE*d);
    float * tile = tiles.data();

    std::vector<float> rows(N_ROWS*d);
    float * row = rows.data();

    fill_tiles<vec_f>(keys, pivots, n_tiles, row, tile);

    for (int64_t t = 0; t < n_tiles; ++t) {
        normalize_tile(reinterpret_cast<vec_f *>(tile + t*N_TILE*d), d);
    }

    for (int64_t i = 0; i < n; i += N_ROWS) {
        vec_f best [N_ROWS];
        vec_i where[N_ROWS];

        for (int r = 0; r < N_ROWS; ++r) {
            kvmerge_prefetch_row(keys.rows, keys.row(evicted[std::min(i + r + N_ROWS, n - 1)]));
            kvmerge_read_row(keys.rows, keys.row(evicted[std::min(i + r, n - 1)]), row + r*d);

            best [r] = vec_f {} - INFINITY;
            where[r] = vec_i {};
        }

        for (int64_t t = 0; t < n_tiles; ++t) {
            const vec_f * x = reinterpret_cast<const vec_f *>(tile + t*N_TILE*d);

            vec_f sum[N_ROWS][N_VECS] = {};

            for (int64_t e = 0; e < d; ++e) {
                for (int r = 0; r < N_ROWS; ++r) {
                    for (int c = 0; c < N_VECS; ++c) {
                        sum[r][c] += row[r*d + e]*x[e*N_VECS + c];
                    }
                }
            }

            for (int r = 0; r < N_ROWS; ++r) {
                for (int c = 0; c < N_VECS; ++c) {
                    const vec_i is_best = sum[r][c] >= best[r];

                    best [r] = is_best ? sum[r][c] : best[r];
                    where[r] = is_best ? vec_i {} + (int32_t) (t*N_VECS + c) : where[r];
                }
            }
        }

        for (int r = 0; r < N_ROWS && i + r < n; ++r) {
            nearest[i + r] = pivots[std::min<int32_t>(best_lane(best[r], where[r]), n_pivots - 1)];
        }
    }
}

KVMERGE_FOR_EACH_WIDTH(nearest_of, find_nearest,
        (const kvmerge_keys_of_head & keys, const std::vector<int32_t> & pivots, const int32_t * evicted, int64_t n, int32_t * nearest),
        (keys, pivots, evicted, n, nearest))

void kvmerge_nearest(const kvmerge_keys_of_head & keys, const std::vector<int32_t> & pivots, const int32_t * evicted, int64_t n, int32_t * nearest) {
    nearest_of(keys, pivots, evicted, n, nearest);
}

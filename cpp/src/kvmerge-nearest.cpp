#include "kvmerge-nearest.h"

#include "kvmerge-fuse.h"
#include "kvmerge-vectors.h"

#include <algorithm>
#include <cstdint>

#if defined(KVMERGE_VECTORS)

// The pivots are transposed into tiles of N_VECS vectors, value by value, so that every lane of a vector belongs to
// another pivot: its products add up in place, and so does its maximum. N_ROWS keys share the loads of a tile; their
// products with it are what fills the registers.
template <typename vec_f, typename vec_i>
KVMERGE_INLINE void find_nearest(const ggml_tensor * pivots, const ggml_tensor * keys, int32_t * dst, int64_t first, int64_t last) {
    constexpr int N_ROWS = sizeof(vec_f) == 64 ? 8 : 6;
    constexpr int N_VECS = sizeof(vec_f) == 64 ? 3 : 2;

    constexpr int64_t N_LANES = sizeof(vec_f)/sizeof(float);
    constexpr int64_t N_TILE  = N_LANES*N_VECS;

    const int64_t d        = pivots->ne[0];
    const int64_t n_pivots = pivots->ne[1];
    const int64_t n_tiles  = (n_pivots + N_TILE - 1)/N_TILE;

    const float * p = static_cast<const float *>(pivots->data);
    const float * k = static_cast<const float *>(keys->data);

    // the last tile is filled up with the last pivot
    kvmerge_aligned_floats tiles(n_tiles*N_TILE*d);
    float * tile = tiles.data();

    for (int64_t j = 0; j < n_tiles*N_TILE; ++j) {
        const float * src = p + std::min(j, n_pivots - 1)*d;
        for (int64_t e = 0; e < d; ++e) {
            tile[(j/N_TILE*d + e)*N_TILE + j%N_TILE] = src[e];
        }
    }

    for (int64_t i = first; i < last; i += N_ROWS) {
        const float * row[N_ROWS];
        vec_f best [N_ROWS];
        vec_i where[N_ROWS];

        for (int r = 0; r < N_ROWS; ++r) {
            row  [r] = k + std::min(i + r, last - 1)*d;
            best [r] = vec_f {} - __builtin_inff();
            where[r] = vec_i {};
        }

        for (int64_t t = 0; t < n_tiles; ++t) {
            const vec_f * x = reinterpret_cast<const vec_f *>(tile + t*N_TILE*d);

            vec_f sum[N_ROWS][N_VECS] = {};

            for (int64_t e = 0; e < d; ++e) {
                for (int r = 0; r < N_ROWS; ++r) {
                    for (int c = 0; c < N_VECS; ++c) {
                        sum[r][c] += row[r][e]*x[e*N_VECS + c];
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

        // of equal products the last counts, as in ggml_argmax
        for (int r = 0; r < N_ROWS && i + r < last; ++r) {
            float   max = -__builtin_inff();
            int32_t idx = 0;

            for (int l = 0; l < N_LANES; ++l) {
                const int32_t cur = where[r][l]*N_LANES + l;

                if (best[r][l] > max || (best[r][l] == max && cur > idx)) {
                    max = best[r][l];
                    idx = cur;
                }
            }

            dst[i + r] = std::min<int32_t>(idx, n_pivots - 1);
        }
    }
}

KVMERGE_FOR_EACH_WIDTH(nearest, find_nearest,
        (const ggml_tensor * pivots, const ggml_tensor * keys, int32_t * dst, int64_t first, int64_t last), (pivots, keys, dst, first, last))

static void compute_nearest(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const ggml_tensor * pivots = dst->src[0];
    const ggml_tensor * keys   = dst->src[1];

    const int64_t n = keys->ne[1];

    nearest(pivots, keys, static_cast<int32_t *>(dst->data), n*ith/nth, n*(ith + 1)/nth);
}

#endif // KVMERGE_VECTORS

bool kvmerge_can_fuse_nearest(const ggml_tensor * cache) {
#if defined(KVMERGE_VECTORS)
    return kvmerge_can_fuse(cache);
#else
    GGML_UNUSED(cache);

    return false;
#endif
}

ggml_tensor * kvmerge_build_nearest(ggml_context * ctx, ggml_tensor * pivots, ggml_tensor * keys, bool fuse) {
#if defined(KVMERGE_VECTORS)
    if (fuse) {
        ggml_tensor * args[] = { pivots, keys };

        return ggml_custom_4d(ctx, GGML_TYPE_I32, keys->ne[1], 1, 1, 1, args, 2, compute_nearest, GGML_N_TASKS_MAX, nullptr);
    }
#else
    GGML_UNUSED(fuse);
#endif
    ggml_tensor * product = ggml_mul_mat(ctx, pivots, keys);                             // [n_pivots, n_keys]
    ggml_prec_set_acc(product, GGML_PREC_F32);

    return ggml_argmax(ctx, product);
}

#include "kvmerge-nearest.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstdint>
#include <vector>

// The vectors of GCC and Clang: libllama is compiled for any machine of an architecture, and what this one can do better
// is chosen when it runs.
#if defined(__GNUC__)
#    define KVMERGE_VECTORS
#    if defined(__x86_64__)
#        define KVMERGE_VECTORS_X86
#    endif
#endif

#if defined(KVMERGE_VECTORS)

typedef float   vec_f4  __attribute__((vector_size(16)));
typedef int32_t vec_i4  __attribute__((vector_size(16)));
typedef float   vec_f8  __attribute__((vector_size(32)));
typedef int32_t vec_i8  __attribute__((vector_size(32)));
typedef float   vec_f16 __attribute__((vector_size(64)));
typedef int32_t vec_i16 __attribute__((vector_size(64)));

// The pivots are transposed into tiles of N_VECS vectors, value by value, so that every lane of a vector belongs to
// another pivot: its products add up in place, and so does its maximum. N_ROWS keys share the loads of a tile; their
// products with it are what fills the registers.
template <typename vec_f, typename vec_i, int N_ROWS, int N_VECS>
__attribute__((always_inline))
static inline void nearest(const ggml_tensor * pivots, const ggml_tensor * keys, int32_t * dst, int64_t first, int64_t last) {
    constexpr int64_t N_LANES = sizeof(vec_f)/sizeof(float);
    constexpr int64_t N_TILE  = N_LANES*N_VECS;

    const int64_t d        = pivots->ne[0];
    const int64_t n_pivots = pivots->ne[1];
    const int64_t n_tiles  = (n_pivots + N_TILE - 1)/N_TILE;

    const float * p = static_cast<const float *>(pivots->data);
    const float * k = static_cast<const float *>(keys->data);

    // the last tile is filled up with the last pivot
    std::vector<float> tiles(n_tiles*N_TILE*d + N_LANES);
    float * tile = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(tiles.data()) + sizeof(vec_f) - 1)/sizeof(vec_f)*sizeof(vec_f));

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

static void nearest_plain(const ggml_tensor * pivots, const ggml_tensor * keys, int32_t * dst, int64_t first, int64_t last) {
    nearest<vec_f4, vec_i4, 6, 2>(pivots, keys, dst, first, last);
}

#if defined(KVMERGE_VECTORS_X86)
__attribute__((target("avx2,fma")))
static void nearest_avx2(const ggml_tensor * pivots, const ggml_tensor * keys, int32_t * dst, int64_t first, int64_t last) {
    nearest<vec_f8, vec_i8, 6, 2>(pivots, keys, dst, first, last);
}

__attribute__((target("avx512f")))
static void nearest_avx512(const ggml_tensor * pivots, const ggml_tensor * keys, int32_t * dst, int64_t first, int64_t last) {
    nearest<vec_f16, vec_i16, 8, 3>(pivots, keys, dst, first, last);
}
#endif

static void compute_nearest(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const ggml_tensor * pivots = dst->src[0];
    const ggml_tensor * keys   = dst->src[1];

    auto * nearest = nearest_plain;

#if defined(KVMERGE_VECTORS_X86)
    if (__builtin_cpu_supports("avx512f")) {
        nearest = nearest_avx512;
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        nearest = nearest_avx2;
    }
#endif

    const int64_t n = keys->ne[1];

    nearest(pivots, keys, static_cast<int32_t *>(dst->data), n*ith/nth, n*(ith + 1)/nth);
}

#endif // KVMERGE_VECTORS

bool kvmerge_can_fuse_nearest(const ggml_tensor * cache) {
#if defined(KVMERGE_VECTORS)
    return ggml_backend_buffer_is_host(cache->buffer);
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

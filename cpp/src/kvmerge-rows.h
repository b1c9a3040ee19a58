#pragma once

// rows of K or V in the memory of the host, read as floats whatever their type.

#include "kvmerge-vectors.h"

#include "ggml.h"

#include <cstdint>
#include <cstring>

struct kvmerge_rows {
    const char *    data;
    ggml_type       type;
    int64_t         d;       // values in a row
    size_t          size;    // of a row, in bytes
    ggml_to_float_t convert; // of types that are neither F32 nor F16

    kvmerge_rows(const ggml_tensor * cache, int64_t d) :
        data   (static_cast<const char *>(cache->data)),
        type   (cache->type),
        d      (d),
        size   (ggml_row_size(type, d)),
        convert(ggml_get_type_traits(type)->to_float) {}
};

// Exact, and without branches, so that compilers make vectors of it: ggml's conversion by vectors belongs to its CPU
// backend, which libllama does not link to.
KVMERGE_INLINE void kvmerge_f16_to_f32(const uint16_t * src, int64_t n, float * dst) {
    for (int64_t e = 0; e < n; ++e) {
        const uint32_t magnitude = (src[e] & 0x7fffu) << 13;

        // exponents of F16 are less by 112; multiplied, subnormal values come out right too
        float x;
        memcpy(&x, &magnitude, sizeof(x));
        x *= 0x1p112f;

        uint32_t bits;
        memcpy(&bits, &x, sizeof(bits));
        bits |= (src[e] & 0x8000u) << 16;
        bits |= magnitude >= 0x7c00u << 13 ? 0x7f800000u : 0u; // infinite, or not a number

        memcpy(dst + e, &bits, sizeof(bits));
    }
}

// dst [d]
KVMERGE_INLINE void kvmerge_read_row(const kvmerge_rows & rows, int64_t row, float * dst) {
    const char * src = rows.data + row*rows.size;

    if (rows.type == GGML_TYPE_F16) {
        kvmerge_f16_to_f32(reinterpret_cast<const uint16_t *>(src), rows.d, dst);
    } else if (rows.type == GGML_TYPE_F32) {
        memcpy(dst, src, rows.d*sizeof(float));
    } else {
        rows.convert(src, dst, rows.d);
    }
}

// Rows of one head lie apart, where no machine expects them: ask for those that are read next.
KVMERGE_INLINE void kvmerge_prefetch_row(const kvmerge_rows & rows, int64_t row) {
#if defined(KVMERGE_VECTORS)
    for (size_t i = 0; i < rows.size; i += 64) {
        __builtin_prefetch(rows.data + row*rows.size + i);
    }
#else
    (void) rows;
    (void) row;
#endif
}

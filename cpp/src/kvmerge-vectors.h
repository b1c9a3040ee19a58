#pragma once

// Loops over vectors of several widths: libllama is compiled for any machine of an architecture, and what this one can do
// better is chosen when it runs. The vectors are those of GCC and Clang; for other compilers a vector is one float.
//
// A function is a template over the vector, whose body becomes part of one function per width:
//
//   template <typename vec_f, typename vec_i>
//   KVMERGE_INLINE void scale_by(float * x, int64_t n) { ... }
//
//   KVMERGE_FOR_EACH_WIDTH(scale, scale_by, (float * x, int64_t n), (x, n))

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__GNUC__)
#    define KVMERGE_VECTORS
#    define KVMERGE_INLINE __attribute__((always_inline)) static inline

typedef float   kvmerge_f4  __attribute__((vector_size(16)));
typedef int32_t kvmerge_i4  __attribute__((vector_size(16)));
typedef float   kvmerge_f8  __attribute__((vector_size(32)));
typedef int32_t kvmerge_i8  __attribute__((vector_size(32)));
typedef float   kvmerge_f16 __attribute__((vector_size(64)));
typedef int32_t kvmerge_i16 __attribute__((vector_size(64)));
#else
#    define KVMERGE_INLINE static inline

typedef float   kvmerge_f4;
typedef int32_t kvmerge_i4;
#endif

#if defined(__GNUC__) && defined(__x86_64__)
#    define KVMERGE_FOR_EACH_WIDTH(name, name_of, declaration, arguments)                                                           \
        static void name##_plain declaration { name_of<kvmerge_f4, kvmerge_i4> arguments; }                                         \
        __attribute__((target("avx2,fma"))) static void name##_avx2   declaration { name_of<kvmerge_f8,  kvmerge_i8>  arguments; } \
        __attribute__((target("avx512f")))  static void name##_avx512 declaration { name_of<kvmerge_f16, kvmerge_i16> arguments; } \
        static void name declaration {                                                                                              \
            if (__builtin_cpu_supports("avx512f")) {                                                                                \
                name##_avx512 arguments;                                                                                            \
            } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {                                           \
                name##_avx2 arguments;                                                                                              \
            } else {                                                                                                                \
                name##_plain arguments;                                                                                             \
            }                                                                                                                       \
        }
#else
#    define KVMERGE_FOR_EACH_WIDTH(name, name_of, declaration, arguments) \
        static void name declaration { name_of<kvmerge_f4, kvmerge_i4> arguments; }
#endif

// floats that start where a vector of any width may
class kvmerge_aligned_floats {
public:
    explicit kvmerge_aligned_floats(size_t n) : floats(n + ALIGNMENT/sizeof(float)) {}

    float * data() {
        return reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(floats.data()) + ALIGNMENT - 1)/ALIGNMENT*ALIGNMENT);
    }

private:
    static constexpr size_t ALIGNMENT = 64;

    std::vector<float> floats;
};

// unsigned integers as wide as a vector of floats
template <size_t N_BYTES>
struct kvmerge_bits;

#if defined(KVMERGE_VECTORS)
template <> struct kvmerge_bits<16> { typedef uint32_t type __attribute__((vector_size(16))); };
template <> struct kvmerge_bits<32> { typedef uint32_t type __attribute__((vector_size(32))); };
template <> struct kvmerge_bits<64> { typedef uint32_t type __attribute__((vector_size(64))); };
#endif
template <> struct kvmerge_bits<sizeof(float)> { typedef uint32_t type; };

// x = e^x to 3e-7 of it, 0 below e^-87: 2^n times a polynomial of what is left, at most ln(2)/2
// (coefficients: S. Moshier, Cephes, expf)
template <typename vec_f>
KVMERGE_INLINE void kvmerge_exp(vec_f & x) {
    // adding 1.5*2^23 rounds to an integer, which is then in the lowest bits
    const vec_f shifted = x*1.44269504088896341f + 12582912.0f;
    const vec_f n       = shifted - 12582912.0f;
    const vec_f r       = x - n*0.693359375f + n*2.12194440e-4f;

    vec_f y = r*1.9875691500e-4f + 1.3981999507e-3f;
    y = y*r + 8.3334519073e-3f;
    y = y*r + 4.1665795894e-2f;
    y = y*r + 1.6666665459e-1f;
    y = y*r + 5.0000001201e-1f;
    y = y*r*r + r + 1.0f;

    typename kvmerge_bits<sizeof(vec_f)>::type bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + 127u) << 23;

    vec_f scale;
    memcpy(&scale, &bits, sizeof(scale));

    x = x < vec_f {} - 87.0f ? vec_f {} : y*scale;
}

template <typename vec_f>
KVMERGE_INLINE void kvmerge_max(vec_f & x, const vec_f & y) {
    x = y > x ? y : x;
}

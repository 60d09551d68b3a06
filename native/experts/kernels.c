/* The kernels of experts.c: products.h for each kind of processor. */
#include "kernels.h"

#include <math.h>

#include "bfloat16.h"
#include "float16.h"

#ifdef __aarch64__
#include <arm_neon.h>
#endif

#define BLOCK_BYTES (16 << 10) /* of a panel; also how far ahead weights are asked for */
#define WIDEN_TILES 8          /* so many tiles of rows are worth widening bfloat16 beforehand */
#define LIMIT 7.0f             /* GPT-OSS's clamp and factor */
#define ALPHA 1.702f

typedef union {
    float floats[SIDE];
    uint16_t pairs[SIDE + 1];
} Spread;

static inline float value_at(const char *values, Py_ssize_t i, Format format) {
    float value;
    uint16_t bits;
    if (format == FLOAT32) {
        memcpy(&value, values + i * 4, 4);
        return value;
    }
    memcpy(&bits, values + i * 2, 2);
    return format == BFLOAT16 ? of_bfloat16(bits) : of_float16(bits);
}

typedef float Four __attribute__((vector_size(16)));

static inline Four widen_halves(const char *at) {
    Four values;
    for (int i = 0; i < 4; i++) values[i] = value_at(at, i, FLOAT16);
    return values;
}

static inline void narrow_halves(Four values, uint16_t *at) {
    for (int i = 0; i < 4; i++) at[i] = to_float16(values[i]);
}

#define KERNEL portable
#define TARGET
#define LANES 4
#ifdef __aarch64__
#define MAX_ROWS 6
#define MAX_SUMS 16
#define FUSED(a, b, c) ((Vector)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define MAX_ROWS 3
#define MAX_SUMS 4
#define FUSED(a, b, c) ((a) * (b) + (c))
#endif
#define SPREAD(x) ((Vector){(x), (x), (x), (x)})
#define WIDEN_HALVES(at) widen_halves(at)
#define NARROW_HALVES(vector, at) narrow_halves(vector, at)
#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_KINDS 1
#include <immintrin.h>

#define KERNEL avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define MAX_ROWS 6
#define MAX_SUMS 8
#define SPREAD(x) ((Vector)_mm256_set1_ps(x))
#define FUSED(a, b, c) ((Vector)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define WIDEN_HALVES(at) ((Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at))))
#define NARROW_HALVES(vector, at) \
    _mm_storeu_si128((__m128i *)(at), _mm256_cvtps_ph((__m256)(vector), _MM_FROUND_TO_NEAREST_INT))
#include "products.h"

#define KERNEL avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define LANES 16
#define MAX_ROWS 12
#define MAX_SUMS 24
#define SPREAD(x) ((Vector)_mm512_set1_ps(x))
#define FUSED(a, b, c) ((Vector)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define WIDEN_HALVES(at) ((Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(at))))
#define NARROW_HALVES(vector, at)            \
    _mm256_storeu_si256((__m256i *)(at),     \
                        _mm512_cvtps_ph((__m512)(vector), _MM_FROUND_TO_NEAREST_INT))
#include "products.h"

#if __GNUC__ >= 10 || defined(__clang__) /* older ones do not know the instruction */
#define HAS_PAIRS_KIND 1
#define KERNEL avx512_bf16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")))
#define LANES 16
#define MAX_ROWS 12
#define MAX_SUMS 24
#define SPREAD(x) ((Vector)_mm512_set1_ps(x))
#define FUSED(a, b, c) ((Vector)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define WIDEN_HALVES(at) ((Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(at))))
#define NARROW_HALVES(vector, at)            \
    _mm256_storeu_si256((__m256i *)(at),     \
                        _mm512_cvtps_ph((__m512)(vector), _MM_FROUND_TO_NEAREST_INT))
#define ADD_PAIRS(sums, weights, pair)                                       \
    ((Vector)_mm512_dpbf16_ps((__m512)(sums), (__m512bh)(__m512i)(weights),  \
                              (__m512bh)_mm512_set1_epi32(pair)))
#include "products.h"
#endif

#if defined(HAS_PAIRS_KIND) && defined(HAS_TILES)
#define HAS_TILES_KIND 1
/* AMX tiles multiply pairs, of rows that lie as they are: in tiles of one row. Whatever else there
 * is to do is the next best kernel's. */
#ifndef NEXT_BEST
#define NEXT_BEST avx512_bf16
#endif
#define JOINED(stem, kernel) stem##_##kernel
#define JOINED_IN(stem, kernel) JOINED(stem, kernel)
#define NEXT(stem) JOINED_IN(stem, NEXT_BEST)

static void tile_rows_amx(const char *given, Py_ssize_t num_rows, Py_ssize_t width,
                          Py_ssize_t size, Format format, int in_pairs, float *tiled) {
    if (in_pairs) NEXT(tile_pairs)(given, num_rows, width, size, 1, (uint32_t *)tiled);
    else NEXT(tile_rows)(given, num_rows, width, size, format, 0, tiled);
}

static void multiply_amx(const char *panel, const float *rows, Py_ssize_t num_rows,
                         Py_ssize_t size, Format format, float *sums) {
    if (format == PAIRS) multiply_tiles(panel, (const char *)rows, num_rows, size, sums);
    else NEXT(multiply)(panel, rows, num_rows, size, format, sums);
}

static void gate_sums_amx(const float *sums, const Shape *shape, const float *biases,
                          Py_ssize_t number, Py_ssize_t num_rows, float *tiled) {
    if (shape->weights == PAIRS)
        NEXT(gate_tiles)(sums, shape, biases, number, num_rows, 1, tiled);
    else
        NEXT(gate_sums)(sums, shape, biases, number, num_rows, tiled);
}

static const Kernel kernel_amx = {tile_rows_amx, multiply_amx, gate_sums_amx, NEXT(round_sums), 1};
#endif

#ifdef HAS_PAIRS_KIND
static int has_avx512_bf16(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif

#ifdef HAS_TILES_KIND
static int has_amx(void) { return has_avx512_bf16() && may_use_tiles(); }
#endif
#endif

/* The fastest first. Kernels of one class have equal bits. */
static const struct {
    const char *name, *class, *class_of_bfloat16;
    int (*is_possible)(void);
    const Kernel *kernel;
} KINDS[] = {
#ifdef HAS_TILES_KIND
    {"amx", "fused", "tiled", has_amx, &kernel_amx},
#endif
#ifdef HAS_PAIRS_KIND
    {"avx512_bf16", "fused", "paired", has_avx512_bf16, &kernel_avx512_bf16},
#endif
#ifdef HAS_KINDS
    {"avx512", "fused", "fused", has_avx512, &kernel_avx512},
    {"avx2", "fused", "fused", has_avx2, &kernel_avx2},
#endif
#ifdef __aarch64__
    {"portable", "fused", "fused", is_anywhere, &kernel_portable},
#else
    {"portable", "unfused", "unfused", is_anywhere, &kernel_portable},
#endif
};
#define NUM_KINDS (Py_ssize_t)(sizeof KINDS / sizeof *KINDS)

/* ffn_kernels() -> ((name, class, class in bfloat16), ...) of the kernels that this processor can
 * run, the fastest first; kernels of one class give a row the same bits */
FUNCTION(ffn_kernels) {
    if (!are_given(given, 0)) return NULL;
    PyObject *found = PyList_New(0), *result = NULL;
    if (!found) return NULL;
    for (Py_ssize_t i = 0; i < NUM_KINDS; i++) {
        if (!KINDS[i].is_possible()) continue;
        PyObject *pair = Py_BuildValue("(sss)", KINDS[i].name, KINDS[i].class,
                                       KINDS[i].class_of_bfloat16);
        int has_failed = !pair || PyList_Append(found, pair);
        Py_XDECREF(pair);
        if (has_failed) goto done;
    }
    result = PyList_AsTuple(found);
done:
    Py_DECREF(found);
    return result;
}

/* The kernel of a name, or the fastest for None; NULL with an error set. */
const Kernel *kernel_named(PyObject *name) {
    if (name != Py_None && !PyUnicode_Check(name)) {
        PyErr_SetString(PyExc_TypeError, "a kernel must be a name or None");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < NUM_KINDS; i++)
        if (KINDS[i].is_possible() &&
            (name == Py_None || !PyUnicode_CompareWithASCIIString(name, KINDS[i].name)))
            return KINDS[i].kernel;
    PyErr_SetString(PyExc_ValueError, "this processor has no such kernel");
    return NULL;
}

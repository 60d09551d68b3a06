/* The kernels of attention.c: attention_products.h and attention_tile.h for each kind of processor.
 *
 * Letters as in attention.h.
 */
#include "attention.h"

#include <math.h>

#include "bfloat16.h"
#include "float16.h"

#ifdef __aarch64__
#include <arm_neon.h>
#endif

#define WIDEN_TILES 3 /* so many tiles of rows are worth widening a page beforehand */

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourWhole __attribute__((vector_size(16)));

#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (FourWhole){__VA_ARGS__})
#endif

static inline void transpose(Four *rows) {
    Four a = SHUFFLED(rows[0], rows[1], 0, 4, 1, 5), b = SHUFFLED(rows[0], rows[1], 2, 6, 3, 7);
    Four c = SHUFFLED(rows[2], rows[3], 0, 4, 1, 5), d = SHUFFLED(rows[2], rows[3], 2, 6, 3, 7);
    rows[0] = SHUFFLED(a, c, 0, 1, 4, 5);
    rows[1] = SHUFFLED(a, c, 2, 3, 6, 7);
    rows[2] = SHUFFLED(b, d, 0, 1, 4, 5);
    rows[3] = SHUFFLED(b, d, 2, 3, 6, 7);
}

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

static inline Four widen_halves(const char *at) {
    Four values;
    for (int i = 0; i < 4; i++) values[i] = value_at(at, i, FLOAT16);
    return values;
}

static inline void narrow_halves(Four values, uint16_t *at) {
    for (int i = 0; i < 4; i++) at[i] = to_float16(values[i]);
}

/* The positions that a tile's row `r` sees. */
typedef struct {
    Py_ssize_t begin, end;
} Seen;

static inline Seen seen_by(const Attention *a, const Tile *tile, Py_ssize_t r) {
    Py_ssize_t end = tile->span->start + (tile->begin + r) / a->heads + 1;
    return (Seen){most(end - a->window, 0), end};
}

/* How many rows from row `r` on are of the same token. */
static inline Py_ssize_t rows_of_token(const Attention *a, const Tile *tile, Py_ssize_t r) {
    Py_ssize_t row = tile->begin + r;
    return least(a->heads - row % a->heads, tile->end - row);
}

static inline const char *query_of(const Attention *a, const Tile *tile, Py_ssize_t r) {
    Py_ssize_t token = tile->span->first + (tile->begin + r) / a->heads;
    Py_ssize_t head = tile->head * a->heads + (tile->begin + r) % a->heads;
    return a->queries + (token * a->token_stride + head * a->head_stride) * bytes_of(a->format);
}

static inline char *output_of(const Attention *a, const Tile *tile, Py_ssize_t r) {
    Py_ssize_t token = tile->span->first + (tile->begin + r) / a->heads;
    Py_ssize_t head = tile->head * a->heads + (tile->begin + r) % a->heads;
    Py_ssize_t row = token * a->num_kv * a->heads + head;
    return a->out + row * a->value_size * bytes_of(a->format);
}

/* A head's keys on page number `p` of the tile's sequence. */
static inline const char *keys_of(const Attention *a, const Tile *tile, Py_ssize_t p) {
    if (!a->values) return a->keys + tile->span->pages[p] * PAGE * a->size * bytes_of(a->format);
    Py_ssize_t number = tile->span->pages[p] * a->num_kv + tile->head;
    return a->keys + number * key_bytes(a->format, a->size);
}

static inline const char *values_of(const Attention *a, const Tile *tile, Py_ssize_t p) {
    if (!a->values) return keys_of(a, tile, p);
    Py_ssize_t number = tile->span->pages[p] * a->num_kv + tile->head;
    return a->values + number * PAGE * a->value_size * bytes_of(a->format);
}

#define KERNEL portable
#define TARGET
#define LANES 4
#ifdef __aarch64__
#define MAX_ROWS 4
#define SCORE_PAGES(rows) ((rows) > 2 ? 1 : (rows) > 1 ? 2 : 4)
#define VALUE_VECTORS(rows) 4
#define FUSED(a, b, c) ((Vector)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define MAX_ROWS 2
#define SCORE_PAGES(rows) ((rows) > 1 ? 1 : 2)
#define VALUE_VECTORS(rows) 4
#define FUSED(a, b, c) ((a) * (b) + (c))
#endif
#define SPREAD(x) ((Vector){(x), (x), (x), (x)})
#define LARGER(a, b) ((Vector)(((Whole)(a) & ((a) > (b))) | ((Whole)(b) & ~((a) > (b)))))
#define WIDEN_HALVES(at) widen_halves(at)
#define NARROW_HALVES(vector, at) narrow_halves(vector, at)
#include "attention_products.h"
#include "attention_tile.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_KINDS 1
#include <immintrin.h>

#define KERNEL avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define MAX_ROWS 6
#define SCORE_PAGES(rows) ((rows) > 2 ? 1 : (rows) > 1 ? 2 : 4)
#define VALUE_VECTORS(rows) ((rows) > 2 ? 2 : 4)
#define SPREAD(x) ((Vector)_mm256_set1_ps(x))
#define LARGER(a, b) ((Vector)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define FUSED(a, b, c) ((Vector)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define WIDEN_HALVES(at) ((Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at))))
#define NARROW_HALVES(vector, at) \
    _mm_storeu_si128((__m128i *)(at), _mm256_cvtps_ph((__m256)(vector), _MM_FROUND_TO_NEAREST_INT))
#include "attention_products.h"
#include "attention_tile.h"

#define KERNEL avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define LANES 16
#define MAX_ROWS 6
#define SCORE_PAGES(rows) 4
#define VALUE_VECTORS(rows) 4
#define SPREAD(x) ((Vector)_mm512_set1_ps(x))
#define LARGER(a, b) ((Vector)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define FUSED(a, b, c) ((Vector)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define WIDEN_HALVES(at) ((Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(at))))
#define NARROW_HALVES(vector, at)        \
    _mm256_storeu_si256((__m256i *)(at), \
                        _mm512_cvtps_ph((__m512)(vector), _MM_FROUND_TO_NEAREST_INT))
#include "attention_products.h"
#include "attention_tile.h"

#endif

/* The fastest first. Kernels of one class have equal bits. */
static const struct {
    const char *name, *class;
    int (*is_possible)(void);
    const AttentionKernel *kernel;
} KINDS[] = {
#ifdef HAS_KINDS
    {"avx512", "fused", has_avx512, &attention_avx512},
    {"avx2", "fused", has_avx2, &attention_avx2},
#endif
#ifdef __aarch64__
    {"portable", "fused", is_anywhere, &attention_portable},
#else
    {"portable", "unfused", is_anywhere, &attention_portable},
#endif
};
#define NUM_KINDS (Py_ssize_t)(sizeof KINDS / sizeof *KINDS)

/* attention_kernels() -> ((name, class), ...) of the kernels that this processor can run, the
 * fastest first; kernels of one class give a row the same bits */
FUNCTION(attention_kernels) {
    if (!are_given(given, 0)) return NULL;
    PyObject *found = PyList_New(0), *result = NULL;
    if (!found) return NULL;
    for (Py_ssize_t i = 0; i < NUM_KINDS; i++) {
        if (!KINDS[i].is_possible()) continue;
        PyObject *pair = Py_BuildValue("(ss)", KINDS[i].name, KINDS[i].class);
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
const AttentionKernel *attention_kernel_named(PyObject *name) {
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

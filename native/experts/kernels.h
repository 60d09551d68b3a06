/* The kernels of experts.c, one for each kind of processor.
 *
 * Packed weights are panels, each the K rows of PANEL outputs: [K, PANEL] float32 or float16, or
 * [K / 2, PANEL, 2] bfloat16 with K rounded up to an even number.
 *
 * Letters: P rows, K length of a sum, R rows of a tile.
 */
#pragma once
#include "native.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#define SIDE 16
#define PANEL (2 * SIDE)
#define MAX_SIZE (1 << 24) /* of a row: no product of sizes overflows */
#define SLICE_ROWS 96 /* rows that use a panel while it is in the cache */

/* PAIRS are bfloat16 whose rows are bfloat16 too, for instructions that take pairs of them. */
typedef enum { FLOAT32, BFLOAT16, FLOAT16, PAIRS } Format;

static inline Py_ssize_t bytes_of(Format format) { return format == FLOAT32 ? 4 : 2; }

/* The turns of a loop over K: with pairs of bfloat16 beside each other one has two k. */
static inline Py_ssize_t turns_of(Py_ssize_t size, Format format) {
    return format == BFLOAT16 || format == PAIRS ? (size + 1) / 2 : size;
}

typedef enum { SILU, GELU, GELU_TANH, RELU, CLAMPED } Activation;

typedef struct {
    Py_ssize_t hidden, inner, hidden_length, inner_length; /* lengths of sums */
    Format weights, rows;
    Activation activation;
} Shape;

/* The steps of an expert; products.h has what each does. */
typedef struct {
    void (*tile_rows)(const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Format, int, float *);
    void (*multiply)(const char *, const float *, Py_ssize_t, Py_ssize_t, Format, float *);
    void (*gate_sums)(const float *, const Shape *, const float *, Py_ssize_t, Py_ssize_t, float *);
    void (*round_sums)(float *, const Shape *, const float *, Py_ssize_t, Py_ssize_t, char *);
    int has_pairs;
} Kernel;

/* Whether a kind of kernel is for this processor. */
static inline int is_anywhere(void) { return 1; }

#if defined(__x86_64__) && defined(__GNUC__)
/* Old compilers do not know the name of F16C; a virtual machine may hide it beside AVX2. The
 * processor is asked once: there it takes as long as a small product. */
static inline int has_f16c(void) {
    static int answer; /* 1 for no, 2 for yes */
    int known = __atomic_load_n(&answer, __ATOMIC_RELAXED);
    if (!known) {
        unsigned int a, b, c, d;
        known = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) ? 2 : 1;
        __atomic_store_n(&answer, known, __ATOMIC_RELAXED);
    }
    return known == 2;
}

static inline int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static inline int has_avx512(void) {
#ifdef WITHOUT_AVX512
    return 0;
#endif
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

/* The kernel of a name, or the fastest for None; NULL with an error set. */
const Kernel *kernel_named(PyObject *name);

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define HAS_TILES 1 /* older compilers do not know them */
int may_use_tiles(void);
void multiply_tiles(const char *panel, const char *rows, Py_ssize_t num_rows, Py_ssize_t size,
                    float *sums);
#endif

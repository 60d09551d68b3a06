/* Attention over a paged cache: what attention.c and the kernels of attention_kernels.c share.
 *
 * A page has PAGE slots. Of each page the cache has its G key/value heads one after the other.
 * A head's keys lie in columns, so that a vector holds the same value of several tokens:
 * [D, PAGE] float32 or float16, or [D / 2, PAGE, 2] bfloat16 with D rounded up to an even number.
 * A head's values lie in rows, [PAGE, V]. Latents are keys in rows, [PAGE, D], whose beginnings
 * are the values.
 *
 * Letters: T tokens, G key/value heads, R query heads to each of them, Q = G * R query heads, D
 * values of a key, V of a value, N pages, M rows of a tile.
 */
#pragma once
#include "kernels.h"

#define PAGE 16
#define BLOCK_PAGES 4 /* pages that are read at once, for all rows of a tile */
#define WIDTH_STEP 32 /* a row's sums have room for a multiple of it */
#define TILE_ROWS 24
#define MAX_TILE_ROWS 32

/* One layer's attention; `sizes` are checked before. Strides count values. */
typedef struct {
    const char *queries, *keys, *values; /* values are NULL for latents */
    char *out;                           /* [T, Q, V] */
    const float *sinks;                  /* [Q] or NULL */
    Format format;
    Py_ssize_t num_kv, heads, size, value_size, token_stride, head_stride;
    Py_ssize_t window; /* how many keys a token sees at most, its own included */
    float scaling, softcap; /* 0: scores are not capped */
} Attention;

/* The tokens of one sequence in a step: `count` from `first` on, at positions from `start` on. */
typedef struct {
    Py_ssize_t first, count, start;
    const int64_t *pages; /* all of the sequence's, from position 0 on */
} Span;

/* The rows of one tile: numbers `begin` to `end` of a span's tokens and their R query heads. */
typedef struct {
    const Span *span;
    Py_ssize_t head, begin, end; /* `head` is the key/value head */
} Tile;

typedef struct {
    void (*attend)(const Attention *, const Tile *, float *);
} AttentionKernel;

/* The kernel of a name, or the fastest for None; NULL with an error set. */
const AttentionKernel *attention_kernel_named(PyObject *name);

static inline Py_ssize_t most(Py_ssize_t a, Py_ssize_t b) { return a > b ? a : b; }
static inline Py_ssize_t least(Py_ssize_t a, Py_ssize_t b) { return a < b ? a : b; }

static inline Py_ssize_t padded(Py_ssize_t count, Py_ssize_t step) {
    return (count + step - 1) / step * step;
}

/* The bytes of a page's keys of one head, in columns. */
static inline Py_ssize_t key_bytes(Format format, Py_ssize_t size) {
    return (format == BFLOAT16 ? padded(size, 2) : size) * PAGE * bytes_of(format);
}

/* The float32 that `attend` needs for a tile of M rows that sees so many pages, aligned to 64. */
static inline Py_ssize_t scratch_size(const Attention *a, Py_ssize_t rows, Py_ssize_t pages) {
    Py_ssize_t width = padded(a->value_size, WIDTH_STEP), size = padded(a->size, WIDTH_STEP);
    return rows * (size + width + pages * PAGE + PAGE) + BLOCK_PAGES * PAGE * most(size, width) +
           4 * size;
}

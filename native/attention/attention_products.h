/* The products of attention for one kind of processor; included once for each kind, before
 * attention_tile.h, which attends with them.
 *
 * Before it is included there must be:
 *   KERNEL     the suffix of this kind's names
 *   TARGET     an attribute with the instructions that functions may use
 *   LANES      float32 of a vector: 4, 8 or 16
 *   MAX_ROWS  rows whose sums are in registers at once
 *   SCORE_PAGES(rows), VALUE_VECTORS(rows)  pages, and vectors of a value, that go with them
 *   SPREAD(x), FUSED(a, b, c)  LANES times x, and a * b + c; explicitly, since a compiler
 *              that contracts products and sums does so in some loops and not in others
 *   LARGER(a, b)  the larger of each two values, and b where one of them is NaN
 *   WIDEN_HALVES(at), NARROW_HALVES(vector, at)  LANES of float16 from memory, and to it
 *
 * Every sum has one order. A score begins with zero and adds the products of D one by one; a
 * row's output adds those of its tokens one by one, from the first that it sees on. Shares are
 * summed in PAGE sums by their places in the page, which are then added in pairs. A product is
 * added with one rounding where the processor has such an instruction, and with two elsewhere. So
 * a row's bits depend on its query and on the keys and values that it sees, and neither on LANES
 * nor on the other rows of a tile.
 *
 * Letters as in attention.h; B pages of a block, W a value's room: V up to a multiple of 2 LANES.
 */
#define NAME_OF(stem, kernel) stem##_##kernel
#define NAME_IN(stem, kernel) NAME_OF(stem, kernel)
#define NAME(stem) NAME_IN(stem, KERNEL)
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLLED _Pragma("GCC unroll 16")
#define PARTS (PAGE / LANES) /* vectors of a page's tokens */
#define STEP (2 * LANES)

typedef float NAME(Vector) __attribute__((vector_size(LANES * 4)));
typedef float NAME(LooseVector) __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
typedef int32_t NAME(Whole) __attribute__((vector_size(LANES * 4)));
typedef uint32_t NAME(Bits) __attribute__((vector_size(LANES * 4)));
typedef uint32_t NAME(LooseBits) __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
typedef uint16_t NAME(Halves) __attribute__((vector_size(LANES * 2), aligned(1), may_alias));
#define Vector NAME(Vector)
#define LooseVector NAME(LooseVector)
#define Whole NAME(Whole)
#define Bits NAME(Bits)
#define LooseBits NAME(LooseBits)
#define Halves NAME(Halves)

/* scores[p][r] of `num_rows` queries, in columns [D, M], with `num_pages` pages of keys. Constant
 * arguments keep the sums in registers. Scores are [B, M, PAGE]. BLOCK_PAGES further are the pages
 * of the next block, which are asked for: pages are not adjacent, and no processor guesses them. */
INLINE void NAME(add_products)(const char *const *pages, const float *queries, Py_ssize_t rows,
                               Py_ssize_t size, int num_rows, int num_pages, Format format,
                               float *scores) {
    Vector sums[MAX_ROWS][BLOCK_PAGES * PARTS];
    const int count = num_pages * PARTS;
    UNROLLED for (int r = 0; r < num_rows; r++)
        UNROLLED for (int v = 0; v < count; v++) sums[r][v] = (Vector){};
    Py_ssize_t at = 0, d = 0;
    if (format == BFLOAT16) {
        for (; d < size; d += 2, at += PAGE * 4) {
            Vector keys[BLOCK_PAGES * PARTS];
            UNROLLED for (int p = 0; p < num_pages; p++)
                __builtin_prefetch(pages[BLOCK_PAGES + p] + at);
            UNROLLED for (int v = 0; v < count; v++)
                keys[v] = (Vector)(*(const LooseBits *)(pages[v / PARTS] + at +
                                                        v % PARTS * LANES * 4) << 16);
            UNROLLED for (int r = 0; r < num_rows; r++) {
                Vector query = SPREAD(queries[r]);
                UNROLLED for (int v = 0; v < count; v++)
                    sums[r][v] = FUSED(keys[v], query, sums[r][v]);
            }
            queries += rows;
            if (d + 1 == size) break;
            /* Those of odd d are read again: with both at once, sums would leave registers. */
            __asm__ volatile("" ::: "memory");
            UNROLLED for (int v = 0; v < count; v++)
                keys[v] = (Vector)(*(const LooseBits *)(pages[v / PARTS] + at +
                                                        v % PARTS * LANES * 4) & 0xffff0000);
            UNROLLED for (int r = 0; r < num_rows; r++) {
                Vector query = SPREAD(queries[r]);
                UNROLLED for (int v = 0; v < count; v++)
                    sums[r][v] = FUSED(keys[v], query, sums[r][v]);
            }
            queries += rows;
        }
    } else {
        const int step = format == FLOAT16 ? 2 : 4;
        for (; d < size; d++, at += PAGE * step, queries += rows) {
            Vector keys[BLOCK_PAGES * PARTS];
            UNROLLED for (int p = 0; p < num_pages; p++)
                __builtin_prefetch(pages[BLOCK_PAGES + p] + at);
            UNROLLED for (int v = 0; v < count; v++) {
                const char *from = pages[v / PARTS] + at + v % PARTS * LANES * step;
                if (format == FLOAT16) keys[v] = WIDEN_HALVES(from);
                else keys[v] = *(const LooseVector *)from;
            }
            UNROLLED for (int r = 0; r < num_rows; r++) {
                Vector query = SPREAD(queries[r]);
                UNROLLED for (int v = 0; v < count; v++)
                    sums[r][v] = FUSED(keys[v], query, sums[r][v]);
            }
        }
    }
    UNROLLED for (int r = 0; r < num_rows; r++)
        UNROLLED for (int v = 0; v < count; v++)
            *(LooseVector *)(scores + (v / PARTS * rows + r) * PAGE + v % PARTS * LANES) =
                sums[r][v];
}

INLINE void NAME(score_block)(const char *const *pages, Py_ssize_t num_pages,
                              const float *queries, Py_ssize_t rows, Py_ssize_t size,
                              int num_rows, Format format, float *scores) {
    const int many = SCORE_PAGES(num_rows);
    Py_ssize_t p = 0;
    for (; p + many <= num_pages; p += many)
        NAME(add_products)(pages + p, queries, rows, size, num_rows, many, format,
                           scores + p * rows * PAGE);
    if (many > 2 && p + 2 <= num_pages) {
        NAME(add_products)(pages + p, queries, rows, size, num_rows, 2, format,
                           scores + p * rows * PAGE);
        p += 2;
    }
    if (many > 1 && p < num_pages)
        NAME(add_products)(pages + p, queries, rows, size, num_rows, 1, format,
                           scores + p * rows * PAGE);
}

/* Add the weighed values of a block's tokens `begin` to `end` to `count` vectors of the sums
 * [M, W] of `num_rows` rows. Values are rows `step` bytes apart, and begin at byte `at`. Those of
 * bfloat16 come and stay apart: of each 2 LANES first the even ones, then the odd ones. */
INLINE void NAME(add_values)(const char *const *pages, Py_ssize_t step, Py_ssize_t at,
                             const float *shares, Py_ssize_t rows, Py_ssize_t begin,
                             Py_ssize_t end, int num_rows, int count, Format format, float *sums,
                             Py_ssize_t width) {
    Vector all[MAX_ROWS][4];
    UNROLLED for (int r = 0; r < num_rows; r++)
        UNROLLED for (int v = 0; v < count; v++)
            all[r][v] = *(const LooseVector *)(sums + r * width + v * LANES);
    while (begin < end) {
        Py_ssize_t p = begin / PAGE, l = begin % PAGE;
        Py_ssize_t stop = least(end - p * PAGE, PAGE);
        const char *row = pages[p] + l * step + at;
        const char *next = pages[BLOCK_PAGES + p] + l * step + at;
        const float *share = shares + p * rows * PAGE + l;
        begin += stop - l;
        for (; l < stop; l++, row += step, next += step, share++) {
            Vector values[4];
            for (int byte = 0; byte < count * LANES * (format == FLOAT32 ? 4 : 2); byte += 64)
                __builtin_prefetch(next + byte);
            if (format == BFLOAT16) {
                UNROLLED for (int v = 0; v < count; v += 2) {
                    Bits pairs = *(const LooseBits *)(row + v * LANES * 2);
                    values[v] = (Vector)(pairs << 16);
                    values[v + 1] = (Vector)(pairs & 0xffff0000);
                }
            } else {
                UNROLLED for (int v = 0; v < count; v++) {
                    if (format == FLOAT16) values[v] = WIDEN_HALVES(row + v * LANES * 2);
                    else values[v] = *(const LooseVector *)(row + v * LANES * 4);
                }
            }
            UNROLLED for (int r = 0; r < num_rows; r++) {
                Vector weight = SPREAD(share[r * PAGE]);
                UNROLLED for (int v = 0; v < count; v++)
                    all[r][v] = FUSED(values[v], weight, all[r][v]);
            }
        }
    }
    UNROLLED for (int r = 0; r < num_rows; r++)
        UNROLLED for (int v = 0; v < count; v++)
            *(LooseVector *)(sums + r * width + v * LANES) = all[r][v];
}

INLINE void NAME(weigh_block)(const char *const *pages, Py_ssize_t step, const float *shares,
                              Py_ssize_t rows, Py_ssize_t begin, Py_ssize_t end, int num_rows,
                              Format format, float *sums, Py_ssize_t width) {
    const int many = VALUE_VECTORS(num_rows), value_bytes = format == FLOAT32 ? 4 : 2;
    Py_ssize_t w = 0;
    for (; w + many * LANES <= width; w += many * LANES)
        NAME(add_values)(pages, step, w * value_bytes, shares, rows, begin, end, num_rows, many,
                         format, sums + w, width);
    if (many > 2 && w < width)
        NAME(add_values)(pages, step, w * value_bytes, shares, rows, begin, end, num_rows, 2,
                         format, sums + w, width);
}

#define SCORE_CASE(n)                                                                          \
    case n:                                                                                    \
        NAME(score_block)(pages, num_pages, queries, rows, size, n, format, scores);           \
        return;
#define WEIGH_CASE(n)                                                                          \
    case n:                                                                                    \
        NAME(weigh_block)(pages, step, shares, rows, begin, end, n, format, sums, width);      \
        return;
#if MAX_ROWS == 6
#define CASES(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#elif MAX_ROWS == 4
#define CASES(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#elif MAX_ROWS == 2
#define CASES(CASE) CASE(1) CASE(2)
#endif
#define WITH_FORMAT(score, weigh, FORMAT)                                                      \
    static TARGET void NAME(score)(const char *const *pages, Py_ssize_t num_pages,             \
                                   const float *queries, Py_ssize_t rows, Py_ssize_t size,     \
                                   int num_rows, float *scores) {                              \
        const Format format = FORMAT;                                                          \
        switch (num_rows) { CASES(SCORE_CASE) }                                                \
    }                                                                                          \
    static TARGET void NAME(weigh)(const char *const *pages, Py_ssize_t step,                  \
                                   const float *shares, Py_ssize_t rows, Py_ssize_t begin,     \
                                   Py_ssize_t end, int num_rows, float *sums,                  \
                                   Py_ssize_t width) {                                         \
        const Format format = FORMAT;                                                          \
        switch (num_rows) { CASES(WEIGH_CASE) }                                                \
    }
WITH_FORMAT(score_float32, weigh_float32, FLOAT32)
WITH_FORMAT(score_bfloat16, weigh_bfloat16, BFLOAT16)
WITH_FORMAT(score_float16, weigh_float16, FLOAT16)

static TARGET void NAME(score)(const char *const *pages, Py_ssize_t num_pages,
                               const float *queries, Py_ssize_t rows, Py_ssize_t size,
                               int num_rows, Format format, float *scores) {
    if (format == FLOAT32)
        NAME(score_float32)(pages, num_pages, queries, rows, size, num_rows, scores);
    if (format == BFLOAT16)
        NAME(score_bfloat16)(pages, num_pages, queries, rows, size, num_rows, scores);
    if (format == FLOAT16)
        NAME(score_float16)(pages, num_pages, queries, rows, size, num_rows, scores);
}

/* Weigh for any number of rows from row `row` on, in tiles of nearly equal numbers. */
static TARGET void NAME(weigh)(const char *const *pages, Py_ssize_t step, const float *shares,
                               Py_ssize_t rows, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t row,
                               Py_ssize_t count, Format format, float *sums, Py_ssize_t width) {
    Py_ssize_t num_tiles = (count + MAX_ROWS - 1) / MAX_ROWS;
    for (Py_ssize_t t = 0; begin < end && t < num_tiles; t++) {
        Py_ssize_t r = row + count * t / num_tiles;
        int num_rows = (int)(row + count * (t + 1) / num_tiles - r);
        const float *own = shares + r * PAGE;
        float *to = sums + r * width;
        if (format == FLOAT32)
            NAME(weigh_float32)(pages, step, own, rows, begin, end, num_rows, to, width);
        if (format == BFLOAT16)
            NAME(weigh_bfloat16)(pages, step, own, rows, begin, end, num_rows, to, width);
        if (format == FLOAT16)
            NAME(weigh_float16)(pages, step, own, rows, begin, end, num_rows, to, width);
    }
}

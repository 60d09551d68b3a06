/* Products of rows with packed weights for one kind of processor; included once for each kind.
 *
 * Before it is included there must be:
 *   KERNEL     the suffix of this kind's names
 *   TARGET     an attribute with the instructions that functions may use
 *   LANES      float32 of a vector: 4, 8 or 16
 *   MAX_ROWS  rows of the largest tile
 *   MAX_SUMS  most vectors of sums of a panel's whole width at once
 *   SPREAD(x), FUSED(a, b, c)  LANES times x, and a * b + c; explicitly, so that no compiler
 *              chooses which products and sums have one rounding
 *   WIDEN_HALVES(at), NARROW_HALVES(vector, at)  LANES of float16 from memory, and to it
 *   ADD_PAIRS(sums, weights, pair)  sums of products of two bfloat16 each; absent on most
 *
 * Every sum begins with zero and adds its products in the order of K, one by one. So a sum's bits
 * depend neither on the rows of a tile nor on LANES. Each product is added with one rounding where
 * the processor has such an instruction, and with two elsewhere. If rows and weights are bfloat16,
 * an instruction for pairs of them, if there is one, adds the products of two k at a time.
 *
 * Letters: K length of a sum, R rows of a tile.
 */
#define NAME_OF(stem, kernel) stem##_##kernel
#define NAME_IN(stem, kernel) NAME_OF(stem, kernel)
#define NAME(stem) NAME_IN(stem, KERNEL)
#define INLINE static inline __attribute__((always_inline)) TARGET
#define HALF (SIDE / LANES) /* vectors of half a panel's row */
#define UNROLLED _Pragma("GCC unroll 24")

typedef float NAME(Vector) __attribute__((vector_size(LANES * 4)));
typedef float NAME(LooseVector) __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
typedef int32_t NAME(Whole) __attribute__((vector_size(LANES * 4)));
typedef uint32_t NAME(Bits) __attribute__((vector_size(LANES * 4)));
typedef int32_t NAME(LooseWhole) __attribute__((vector_size(LANES * 4), aligned(1), may_alias));
#define Vector NAME(Vector)
#define LooseVector NAME(LooseVector)
#define Whole NAME(Whole)
#define LooseWhole NAME(LooseWhole)
#define Bits NAME(Bits)

/* One turn of a loop over K asks for weights that come later: else reading them from memory would
 * follow the products instead of going on beside them. */
#define ASK_FOR_NEXT                                                \
    do {                                                            \
        __builtin_prefetch(next, 0, 2);                             \
        if (count == 2 * HALF) __builtin_prefetch(next + 64, 0, 2); \
        next += stride;                                             \
    } while (0)

/* Add to the sums of R rows, in rows of PANEL, those of `count` vectors of a panel's columns from
 * `panel` on. `rows` are [K, R]. Constant arguments keep the sums in registers. Each turn asks for
 * weights at `next`, and those of the following turn lie `stride` bytes further. */
INLINE void NAME(add_vectors)(const char *panel, const float *rows, Py_ssize_t size, int num_rows,
                              int count, Format format, const char *next, Py_ssize_t stride,
                              float *sums) {
    Vector all[MAX_ROWS][2 * HALF];
    UNROLLED for (int r = 0; r < num_rows; r++)
        UNROLLED for (int v = 0; v < count; v++)
            all[r][v] = *(const LooseVector *)(sums + r * PANEL + v * LANES);
    if (format == PAIRS) {
#ifdef ADD_PAIRS
        const int32_t *pairs = (const int32_t *)rows;
        for (Py_ssize_t k = 0; k < size; k += 2) {
            Whole weights[2 * HALF];
            ASK_FOR_NEXT;
            UNROLLED for (int v = 0; v < count; v++)
                weights[v] = *(const LooseWhole *)(panel + v * LANES * 4);
            UNROLLED for (int r = 0; r < num_rows; r++)
                UNROLLED for (int v = 0; v < count; v++)
                    all[r][v] = ADD_PAIRS(all[r][v], weights[v], pairs[r]);
            panel += PANEL * 4;
            pairs += num_rows;
        }
#endif
    } else if (format == BFLOAT16) {
        for (Py_ssize_t k = 0; k < size; k += 2) {
            ASK_FOR_NEXT;
            /* Weights of even k are widened and used first: with those of odd k beside them, sums
             * would leave their registers. */
            Vector weights[2 * HALF];
            UNROLLED for (int v = 0; v < count; v++)
                weights[v] = (Vector)((Bits)*(const LooseWhole *)(panel + v * LANES * 4) << 16);
            UNROLLED for (int r = 0; r < num_rows; r++)
                UNROLLED for (int v = 0; v < count; v++)
                    all[r][v] = FUSED(weights[v], SPREAD(rows[r]), all[r][v]);
            __asm__ volatile("" ::: "memory");
            UNROLLED for (int v = 0; v < count; v++)
                weights[v] = (Vector)(*(const LooseWhole *)(panel + v * LANES * 4) &
                                      (int32_t)0xffff0000);
            UNROLLED for (int r = 0; r < num_rows; r++)
                UNROLLED for (int v = 0; v < count; v++)
                    all[r][v] = FUSED(weights[v], SPREAD(rows[num_rows + r]), all[r][v]);
            panel += PANEL * 4;
            rows += 2 * num_rows;
        }
    } else {
        for (Py_ssize_t k = 0; k < size; k++) {
            Vector weights[2 * HALF];
            ASK_FOR_NEXT;
            UNROLLED for (int v = 0; v < count; v++) {
                if (format == FLOAT16) weights[v] = WIDEN_HALVES(panel + v * LANES * 2);
                else weights[v] = *(const LooseVector *)(panel + v * LANES * 4);
            }
            UNROLLED for (int r = 0; r < num_rows; r++)
                UNROLLED for (int v = 0; v < count; v++)
                    all[r][v] = FUSED(weights[v], SPREAD(rows[r]), all[r][v]);
            panel += PANEL * (format == FLOAT16 ? 2 : 4);
            rows += num_rows;
        }
    }
    UNROLLED for (int r = 0; r < num_rows; r++)
        UNROLLED for (int v = 0; v < count; v++)
            *(LooseVector *)(sums + r * PANEL + v * LANES) = all[r][v];
}

INLINE void NAME(add_rows)(const char *panel, const float *rows, Py_ssize_t size, int num_rows,
                           Format format, const char *next, Py_ssize_t stride, float *sums) {
    if (num_rows * 2 * HALF <= MAX_SUMS) {
        NAME(add_vectors)(panel, rows, size, num_rows, 2 * HALF, format, next, stride, sums);
        return;
    }
    stride /= 2;
    NAME(add_vectors)(panel, rows, size, num_rows, HALF, format, next, stride, sums);
    next += turns_of(size, format) * stride;
    NAME(add_vectors)(panel + SIDE * (format == FLOAT16 ? 2 : 4), rows, size, num_rows, HALF,
                      format, next, stride, sums + SIDE);
}

#define ROWS_CASE(n)                                                      \
    case n:                                                               \
        NAME(add_rows)(panel, rows, size, n, format, next, stride, sums); \
        return;
#define WITH_FORMAT(stem, FORMAT)                                                             \
    static TARGET void NAME(stem)(const char *panel, const float *rows, Py_ssize_t size,      \
                                  int num_rows, const char *next, Py_ssize_t stride,          \
                                  float *sums) {                                              \
        const Format format = FORMAT;                                                         \
        switch (num_rows) { ROWS_CASES }                                                      \
    }
#if MAX_ROWS == 12
#define ROWS_CASES                                                                             \
    ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4) ROWS_CASE(5) ROWS_CASE(6) ROWS_CASE(7) \
    ROWS_CASE(8) ROWS_CASE(9) ROWS_CASE(10) ROWS_CASE(11) ROWS_CASE(12)
#elif MAX_ROWS == 6
#define ROWS_CASES                                                                             \
    ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4) ROWS_CASE(5) ROWS_CASE(6)
#elif MAX_ROWS == 3
#define ROWS_CASES ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3)
#endif
WITH_FORMAT(add_float32, FLOAT32)
WITH_FORMAT(add_bfloat16, BFLOAT16)
WITH_FORMAT(add_float16, FLOAT16)
#ifdef ADD_PAIRS
WITH_FORMAT(add_pairs, PAIRS)
#endif

/* Widen `size` rows of a panel of bfloat16. */
static TARGET void NAME(widen_panel)(const char *panel, Py_ssize_t size, float *wide) {
    for (Py_ssize_t k = 0; k < size; k += 2, panel += PANEL * 4, wide += 2 * PANEL) {
        __builtin_prefetch(panel + BLOCK_BYTES, 0, 2);
        __builtin_prefetch(panel + BLOCK_BYTES + PANEL * 2, 0, 2);
        for (int i = 0; i < PANEL; i += LANES) {
            Bits pairs = (Bits)*(const LooseWhole *)(panel + i * 4);
            *(LooseVector *)(wide + i) = (Vector)(pairs << 16);
            *(LooseVector *)(wide + PANEL + i) = (Vector)(pairs & 0xffff0000);
        }
    }
}

/* The sums [P, PANEL] of a panel's columns. The tiles of rows lie one after the other, each
 * [K, R], or [K / 2, R, 2] in PAIRS; K is cut so that weights stay in the cache for all tiles. */
static TARGET void NAME(multiply)(const char *panel, const float *rows, Py_ssize_t num_rows,
                                  Py_ssize_t size, Format format, float *sums) {
    Py_ssize_t num_tiles = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
    int widens = LANES < SIDE && format == BFLOAT16 && num_tiles >= WIDEN_TILES;
    Py_ssize_t step = PANEL * (format == FLOAT32 ? 4 : 2);
    Py_ssize_t block = BLOCK_BYTES / (widens ? PANEL * 4 : step);
    float wide[BLOCK_BYTES / sizeof(float)] __attribute__((aligned(64)));
    memset(sums, 0, num_rows * PANEL * sizeof *sums);
    for (Py_ssize_t k = 0; k < size; k += block) {
        Py_ssize_t length = size - k < block ? size - k : block;
        const char *weights = panel + k * step;
        if (widens) {
            NAME(widen_panel)(weights, length, wide);
            weights = (const char *)wide;
            format = FLOAT32;
        }
        /* All tiles have a part in asking for the next piece: if the first one asked for all of it,
         * the memory would rest while the others are computed. */
        const char *next = weights + (widens ? 0 : BLOCK_BYTES);
        Py_ssize_t stride = widens ? 0 : PANEL * (format == FLOAT16 ? 2 : 4) / num_tiles;
        for (Py_ssize_t t = 0; t < num_tiles; t++) {
            Py_ssize_t begin = num_rows * t / num_tiles, end = num_rows * (t + 1) / num_tiles;
            int count = (int)(end - begin);
            Py_ssize_t at = begin * size + k * count;
            const float *tile = rows + (format == PAIRS ? at / 2 : at);
            float *own = sums + begin * PANEL;
            if (format == FLOAT32)
                NAME(add_float32)(weights, tile, length, count, next, stride, own);
            if (format == BFLOAT16)
                NAME(add_bfloat16)(weights, tile, length, count, next, stride, own);
            if (format == FLOAT16)
                NAME(add_float16)(weights, tile, length, count, next, stride, own);
#ifdef ADD_PAIRS
            if (format == PAIRS)
                NAME(add_pairs)(weights, tile, length, count, next, stride, own);
#endif
            next += turns_of(length, format) * stride;
        }
    }
}

/* Rows [P, width] of bfloat16 in tiles of [size / 2, R] pairs; a value beyond width is zero. */
static TARGET void NAME(tile_pairs)(const char *given, Py_ssize_t num_rows, Py_ssize_t width,
                                    Py_ssize_t size, Py_ssize_t most_rows, uint32_t *tiled) {
    Py_ssize_t num_tiles = (num_rows + most_rows - 1) / most_rows;
    for (Py_ssize_t t = 0; t < num_tiles; t++) {
        Py_ssize_t begin = num_rows * t / num_tiles, count = num_rows * (t + 1) / num_tiles - begin;
        uint32_t *tile = tiled + begin * size / 2;
        for (Py_ssize_t r = 0; r < count; r++) {
            const char *row = given + (begin + r) * width * 2;
            for (Py_ssize_t i = 0; i < width / 2; i++) memcpy(&tile[i * count + r], row + i * 4, 4);
            if (width % 2) {
                uint16_t last[2] = {};
                memcpy(last, row + width * 2 - 2, 2);
                memcpy(&tile[width / 2 * count + r], last, 4);
            }
        }
    }
}

/* Rows [P, width] of a format as float32 in tiles of [size, R]; a value beyond width is zero. */
static TARGET void NAME(tile_rows)(const char *given, Py_ssize_t num_rows, Py_ssize_t width,
                                   Py_ssize_t size, Format format, int in_pairs, float *tiled) {
    if (in_pairs) {
        NAME(tile_pairs)(given, num_rows, width, size, MAX_ROWS, (uint32_t *)tiled);
        return;
    }
    Py_ssize_t num_tiles = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
    for (Py_ssize_t t = 0; t < num_tiles; t++) {
        Py_ssize_t begin = num_rows * t / num_tiles, count = num_rows * (t + 1) / num_tiles - begin;
        float *tile = tiled + begin * size;
        for (Py_ssize_t r = 0; r < count; r++) {
            const char *row = given + (begin + r) * width * (format == FLOAT32 ? 4 : 2);
            Py_ssize_t k = 0;
            for (; k + LANES <= width; k += LANES) {
                Vector values;
                if (format == FLOAT32) values = *(const LooseVector *)(row + k * 4);
                else if (format == FLOAT16) values = WIDEN_HALVES(row + k * 2);
                else for (int i = 0; i < LANES; i++) values[i] = value_at(row, k + i, BFLOAT16);
                for (int i = 0; i < LANES; i++) tile[(k + i) * count + r] = values[i];
            }
            for (; k < width; k++) tile[k * count + r] = value_at(row, k, format);
            for (; k < size; k++) tile[k * count + r] = 0;
        }
    }
}

#include "gating.h"

/* What is between the products, of panel number `number` of gate and up, from sums [P, PANEL];
 * into tiles of `most_rows` at most. */
static TARGET void NAME(gate_tiles)(const float *sums, const Shape *shape, const float *biases,
                                    Py_ssize_t number, Py_ssize_t num_rows, Py_ssize_t most_rows,
                                    float *tiled) {
    Py_ssize_t num_tiles = (num_rows + most_rows - 1) / most_rows, first = number * SIDE;
    Py_ssize_t width = shape->inner - first < SIDE ? shape->inner - first : SIDE;
    for (Py_ssize_t t = 0; t < num_tiles; t++) {
        Py_ssize_t begin = num_rows * t / num_tiles, count = num_rows * (t + 1) / num_tiles - begin;
        Py_ssize_t at = begin * shape->inner_length;
        float *tile = tiled + (shape->weights == PAIRS ? at / 2 : at);
        for (Py_ssize_t r = 0; r < count; r++, sums += PANEL) {
            Spread values;
            for (int i = 0; i < SIDE; i += LANES) {
                Vector gate = *(const LooseVector *)(sums + i);
                Vector up = *(const LooseVector *)(sums + SIDE + i);
                if (biases) {
                    gate += *(const LooseVector *)(biases + number * PANEL + i);
                    up += *(const LooseVector *)(biases + number * PANEL + SIDE + i);
                }
                gate = NAME(gated)(gate, up, shape->activation);
                if (shape->weights == PAIRS) NAME(narrow)(gate, values.pairs + i);
                else *(LooseVector *)(values.floats + i) = gate;
            }
            if (shape->weights == PAIRS) {
                if (width % 2) values.pairs[width] = 0;
                for (Py_ssize_t i = 0; i < width; i += 2)
                    memcpy(&tile[(first + i) / 2 * count + r], values.pairs + i, 4);
                continue;
            }
            for (Py_ssize_t i = 0; i < width; i++) tile[(first + i) * count + r] = values.floats[i];
            if (first + width == shape->inner && shape->inner_length > shape->inner)
                tile[shape->inner * count + r] = 0;
        }
    }
}

/* The same into tiles as `multiply` takes them. */
static TARGET void NAME(gate_sums)(const float *sums, const Shape *shape, const float *biases,
                                   Py_ssize_t number, Py_ssize_t num_rows, float *tiled) {
    NAME(gate_tiles)(sums, shape, biases, number, num_rows, MAX_ROWS, tiled);
}

/* Round sums [P, PANEL] of panel number `number` of down into rows of a format. */
static TARGET void NAME(round_sums)(float *sums, const Shape *shape, const float *biases,
                                    Py_ssize_t number, Py_ssize_t num_rows, char *out) {
    Py_ssize_t first = number * PANEL, left = shape->hidden - first;
    Py_ssize_t width = left < PANEL ? left : PANEL, bytes = shape->rows == FLOAT32 ? 4 : 2;
    for (Py_ssize_t r = 0; r < num_rows; r++, sums += PANEL) {
        char *to = out + (r * shape->hidden + first) * bytes;
        uint16_t narrow[PANEL];
        if (biases)
            for (int i = 0; i < PANEL; i += LANES)
                *(LooseVector *)(sums + i) += *(const LooseVector *)(biases + first + i);
        if (shape->rows == FLOAT32) {
            memcpy(to, sums, width * 4);
            continue;
        }
        if (shape->rows == BFLOAT16)
            for (int i = 0; i < PANEL; i += LANES)
                NAME(narrow)(*(const LooseVector *)(sums + i), narrow + i);
        else
            for (int i = 0; i < PANEL; i += LANES)
                NARROW_HALVES(*(const LooseVector *)(sums + i), narrow + i);
        memcpy(to, narrow, width * 2);
    }
}

#ifdef ADD_PAIRS
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif
static const Kernel NAME(kernel) = {NAME(tile_rows), NAME(multiply), NAME(gate_sums),
                                    NAME(round_sums), HAS_PAIRS};
#undef HAS_PAIRS

#undef Vector
#undef LooseVector
#undef Whole
#undef LooseWhole
#undef Bits
#undef ROWS_CASE
#undef ROWS_CASES
#undef WITH_FORMAT
#undef UNROLLED
#undef HALF
#undef INLINE
#undef NAME
#undef NAME_IN
#undef NAME_OF
#undef KERNEL
#undef TARGET
#undef ASK_FOR_NEXT
#undef LANES
#undef MAX_ROWS
#undef MAX_SUMS
#undef SPREAD
#undef FUSED
#undef WIDEN_HALVES
#undef NARROW_HALVES
#undef ADD_PAIRS

/* A token of each row of logits, drawn by a number in [0, 1).
 *
 * router/engine/sampling.py is the face of this; it does the same with torch where this is not
 * built. All processors draw the same token of the same logits: sums have eight lanes and one order.
 *
 * Letters: W rows, V vocabulary size.
 */
#include "native.h"
#include <float.h>
#include <math.h>

#define LANES 8
#define BLOCK 64 /* logits whose weights are added before others' */
#define LEAST (-700.0) /* e to the power of less counts as 0 */
#define MOST_ROWS (1 << 20) /* no product overflows */

typedef struct {
    const float *logits;
    Py_ssize_t vocab;
    float most;   /* the largest logit */
    double scale; /* 1 / temperature */
    double min_p; /* smaller weights count as 0; the largest is 1 */
} Row;

/* The logits of a block, and -inf beyond the row. */
static const float *block_of(const Row *row, Py_ssize_t begin, float room[BLOCK]) {
    if (begin + BLOCK <= row->vocab) return row->logits + begin;
    for (Py_ssize_t i = 0; i < BLOCK; i++)
        room[i] = begin + i < row->vocab ? row->logits[begin + i] : -INFINITY;
    return room;
}

/* The largest logit; without NaN, which draws nothing. */
FOR_EACH_CPU static float largest(const Row *row) {
    float room[BLOCK], found[LANES], most = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) found[lane] = -INFINITY;
    for (Py_ssize_t begin = 0; begin < row->vocab; begin += BLOCK) {
        const float *block = block_of(row, begin, room);
        for (int i = 0; i < BLOCK; i += LANES)
            for (int lane = 0; lane < LANES; lane++)
                found[lane] = block[i + lane] > found[lane] ? block[i + lane] : found[lane];
    }
    for (int lane = 0; lane < LANES; lane++)
        if (found[lane] > most) most = found[lane];
    return most;
}

/* e to the power of x, from LEAST to 0.
 *
 * With n the whole number next to x / ln 2 it is 2^n times e^r, |r| <= ln 2 / 2. Taylor's series
 * up to r^11 is off by 1e-14 of it at most. */
static inline double exponential(double x) {
    const double magic = 0x1.8p52, per_ln2 = 1.4426950408889634;
    const double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
    double shifted = x * per_ln2 + magic, n = shifted - magic;
    double r = x - n * ln2_high - n * ln2_low;
    double power = 1.0 / 39916800;
    power = power * r + 1.0 / 3628800;
    power = power * r + 1.0 / 362880;
    power = power * r + 1.0 / 40320;
    power = power * r + 1.0 / 5040;
    power = power * r + 1.0 / 720;
    power = power * r + 1.0 / 120;
    power = power * r + 1.0 / 24;
    power = power * r + 1.0 / 6;
    power = power * r + 0.5;
    power = power * r + 1.0;
    power = power * r + 1.0;
    uint64_t bits, exponent;
    memcpy(&bits, &power, sizeof bits);
    memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 52;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* The weights of a block: e to the power of (logit - largest) / temperature, 0 for NaN. Returns
 * their sum. */
FOR_EACH_CPU static double weigh(const Row *row, Py_ssize_t begin, double weights[BLOCK]) {
    float room[BLOCK];
    const float *block = block_of(row, begin, room), most = row->most;
    const double scale = row->scale, min_p = row->min_p;
    for (int i = 0; i < BLOCK; i++) {
        double x = (double)(block[i] - most) * scale;
        double power = exponential(x > LEAST ? x : LEAST);
        power = power >= min_p ? power : 0.0;
        weights[i] = x > LEAST ? power : 0.0;
    }
    double sums[LANES] = {0.0};
    for (int i = 0; i < BLOCK; i += LANES)
        for (int lane = 0; lane < LANES; lane++) sums[lane] += weights[i + lane];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

/* The first token of a block at which the sum of all weights so far exceeds `bound`; else its last
 * token with a weight, and -1 where it has none. */
static int find(const double weights[BLOCK], double before, double bound) {
    int last = -1;
    for (int i = 0; i < BLOCK; i++) {
        before += weights[i];
        if (weights[i] > 0.0) last = i;
        if (before > bound) break;
    }
    return last;
}

/* The token of a row; `sums` has room for one of each block. */
static int64_t draw_row(const Row *row, double uniform, double *sums) {
    double weights[BLOCK], total = 0.0, before = 0.0;
    Py_ssize_t num_blocks = (row->vocab + BLOCK - 1) / BLOCK, last = 0;
    for (Py_ssize_t b = 0; b < num_blocks; b++) {
        total += sums[b] = weigh(row, b * BLOCK, weights);
        if (sums[b] > 0.0) last = b;
    }
    double bound = uniform * total;
    for (Py_ssize_t b = 0; b <= last; b++) {
        if (before + sums[b] > bound || b == last) {
            weigh(row, b * BLOCK, weights);
            int place = find(weights, before, bound);
            return b * BLOCK + (place < 0 ? 0 : place);
        }
        before += sums[b];
    }
    return 0;
}

/* draw(logits [W, V] fp32, params [3, W] fp64: temperature, min-p, uniform; W, out [W] int64)
 * writes a token of each row; any token where logits are NaN or the largest is infinite */
FUNCTION(draw) {
    Buffers buffers = {.count = 0};
    Py_buffer *logits, *params, *out;
    if (!are_given(given, 4)) return NULL;
    Py_ssize_t rows = PyLong_AsSsize_t(args[2]);
    if (rows == -1 && PyErr_Occurred()) return NULL;
    if (!(logits = take(&buffers, args[0], 0))) return NULL;
    if (!(params = take(&buffers, args[1], 0))) return NULL;
    if (!(out = take(&buffers, args[3], 1))) return NULL;
    const Py_ssize_t four = sizeof(float), eight = sizeof(double);
    if (rows < 1 || rows > MOST_ROWS || logits->len < rows * four || logits->len % (rows * four) ||
        params->len != 3 * rows * eight || out->len != rows * eight)
        return refuse(&buffers, "logits, params and out must have as many rows");
    Py_ssize_t vocab = logits->len / four / rows;
    double *sums = PyMem_RawMalloc((vocab + BLOCK - 1) / BLOCK * sizeof *sums);
    if (!sums) {
        release(&buffers);
        return PyErr_NoMemory();
    }
    const double *temperature = params->buf, *min_p = temperature + rows, *uniform = min_p + rows;
    int64_t *token = out->buf;
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t i = 0; i < rows; i++) {
        double scale = 1.0 / temperature[i];
        Row row = {.logits = (const float *)logits->buf + i * vocab,
                   .vocab = vocab,
                   .scale = scale < DBL_MAX ? scale : DBL_MAX,
                   .min_p = min_p[i]};
        row.most = largest(&row);
        token[i] = draw_row(&row, uniform[i], sums);
    }
    Py_END_ALLOW_THREADS;
    PyMem_RawFree(sums);
    release(&buffers);
    Py_RETURN_NONE;
}

/* A token of each row of logits, drawn by a number in [0, 1) from what top-k, top-p and min-p leave.
 *
 * router/engine/sampling.py is the face of this; it does the same with torch where this is not
 * built. Sums have eight lanes and one order on every processor, and no product is fused with a sum.
 *
 * Letters: W rows, V vocabulary size.
 */
#include "native.h"
#include <float.h>
#include <math.h>

#define LANES 8
#define BLOCK 64 /* logits whose weights are added before others' */
#define LEAST (-700.0) /* e to the power of less counts as 0 */
#define NUM_BINS 4097
#define MAX_ROWS (1 << 20) /* no product overflows */

typedef struct {
    const float *logits;
    Py_ssize_t vocab;
    float most;   /* the largest logit */
    double scale; /* 1 / temperature */
    double top_k; /* infinite for all */
    double top_p;
    double min_p; /* smaller weights count as 0; the largest is 1 */
} Row;

/* Weights of like size. */
typedef struct {
    Py_ssize_t count;
    double sum;
} Bin;

/* Memory for a row: whole blocks of weights, their sums, and for top-k and top-p. */
typedef struct {
    double *weights, *sums, *sorted;
    Bin *bins;
} Room;

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

/* The weights of a block: e to the power of (logit - largest) / temperature, 0 for NaN. */
FOR_EACH_CPU static void weigh(const Row *row, Py_ssize_t begin, double weights[BLOCK]) {
    float room[BLOCK];
    const float *block = block_of(row, begin, room), most = row->most;
    const double scale = row->scale;
    for (int i = 0; i < BLOCK; i++) {
        double x = (double)(block[i] - most) * scale;
        double power = exponential(x > LEAST ? x : LEAST);
        weights[i] = x > LEAST ? power : 0.0;
    }
}

/* Take out what is below min-p, and return the sum of a block's weights. */
FOR_EACH_CPU static double sum_of(double weights[BLOCK], double min_p) {
    double sums[LANES] = {0.0};
    for (int i = 0; i < BLOCK; i++) weights[i] = weights[i] >= min_p ? weights[i] : 0.0;
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

/* A bin of weights from 1 down, 64 for each halving; the last has all that are smaller. */
static inline int bin_of(double weight) {
    uint64_t bits;
    memcpy(&bits, &weight, sizeof bits);
    uint64_t below = (0x3ff0000000000000u >> 46) - (bits >> 46);
    return below < NUM_BINS ? (int)below : NUM_BINS - 1;
}

static int is_less(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a < b) - (a > b);
}

/* Put the weights of a bin in descending order; returns how many there are. */
static Py_ssize_t sort_bin(const Room *room, Py_ssize_t vocab, int bin) {
    Py_ssize_t count = 0;
    for (Py_ssize_t i = 0; i < vocab; i++)
        if (bin_of(room->weights[i]) == bin) room->sorted[count++] = room->weights[i];
    qsort(room->sorted, count, sizeof *room->sorted, is_less);
    return count;
}

/* Count the weights of each bin, and add them. */
static void fill_bins(const Row *row, const Room *room) {
    memset(room->bins, 0, NUM_BINS * sizeof *room->bins);
    for (Py_ssize_t i = 0; i < row->vocab; i++) {
        Bin *bin = &room->bins[bin_of(room->weights[i])];
        bin->count++;
        bin->sum += room->weights[i];
    }
}

/* The sum of the `most` largest weights. */
static double sum_of_largest(const Row *row, const Room *room, Py_ssize_t most) {
    double sum = 0.0;
    int b = 0;
    for (; b < NUM_BINS && room->bins[b].count <= most; b++) {
        sum += room->bins[b].sum;
        most -= room->bins[b].count;
    }
    if (b < NUM_BINS && most) {
        sort_bin(room, row->vocab, b);
        for (Py_ssize_t i = 0; i < most; i++) sum += room->sorted[i];
    }
    return sum;
}

/* The least weight that top-k and top-p keep, and how many of its equals.
 *
 * Top-p keeps the fewest of the largest whose share of what top-k keeps reaches it, at least one.
 * Only the bin in which a limit falls is sorted. */
static double least_kept(const Row *row, const Room *room, Py_ssize_t *num_equal) {
    Py_ssize_t left = row->top_k < (double)row->vocab ? (Py_ssize_t)row->top_k : row->vocab;
    double reached = 0.0, least = 1.0, bound = INFINITY;
    int b = 0;
    fill_bins(row, room);
    if (row->top_p < 1.0) bound = row->top_p * sum_of_largest(row, room, left);
    for (; room->bins[b].count < left && reached + room->bins[b].sum < bound; b++) {
        reached += room->bins[b].sum;
        left -= room->bins[b].count;
    }
    Py_ssize_t count = sort_bin(room, row->vocab, b);
    *num_equal = 0;
    for (Py_ssize_t i = 0; i < count && i < left && (reached < bound || !(reached > 0.0)); i++) {
        *num_equal = room->sorted[i] == least ? *num_equal + 1 : 1;
        least = room->sorted[i];
        reached += least;
    }
    return least;
}

/* Take out the weights that top-k and top-p do not keep; the first of equal ones are kept. */
static void filter(const Row *row, const Room *room) {
    Py_ssize_t num_equal;
    double least = least_kept(row, room, &num_equal);
    for (Py_ssize_t i = 0; i < row->vocab; i++) {
        double weight = room->weights[i];
        if (weight < least || (weight == least && num_equal-- <= 0)) room->weights[i] = 0.0;
    }
}

/* The token of a row. */
static int64_t draw_row(const Row *row, double uniform, const Room *room) {
    double total = 0.0, before = 0.0;
    Py_ssize_t num_blocks = (row->vocab + BLOCK - 1) / BLOCK, last = 0;
    for (Py_ssize_t b = 0; b < num_blocks; b++) weigh(row, b * BLOCK, room->weights + b * BLOCK);
    if (row->top_k < (double)row->vocab || row->top_p < 1.0) filter(row, room);
    for (Py_ssize_t b = 0; b < num_blocks; b++) {
        total += room->sums[b] = sum_of(room->weights + b * BLOCK, row->min_p);
        if (room->sums[b] > 0.0) last = b;
    }
    double bound = uniform * total;
    Py_ssize_t b = 0;
    for (; b < last && before + room->sums[b] <= bound; b++) before += room->sums[b];
    int place = find(room->weights + b * BLOCK, before, bound);
    return b * BLOCK + (place < 0 ? 0 : place);
}

/* draw(logits [W, V] fp32, params [5, W] fp64: temperature, top-k, top-p, min-p, uniform; W,
 * out [W] int64)
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
    if (rows < 1 || rows > MAX_ROWS || logits->len < rows * four || logits->len % (rows * four) ||
        params->len != 5 * rows * eight || out->len != rows * eight)
        return refuse(&buffers, "logits, params and out must have as many rows");
    Py_ssize_t vocab = logits->len / four / rows, num_blocks = (vocab + BLOCK - 1) / BLOCK;
    Room room = {.weights = PyMem_RawMalloc(2 * num_blocks * BLOCK * eight),
                 .sums = PyMem_RawMalloc(num_blocks * eight),
                 .bins = PyMem_RawMalloc(NUM_BINS * sizeof(Bin))};
    int has_memory = room.weights && room.sums && room.bins;
    if (has_memory) {
        room.sorted = room.weights + num_blocks * BLOCK;
        const double *param = params->buf;
        int64_t *token = out->buf;
        Py_BEGIN_ALLOW_THREADS;
        for (Py_ssize_t i = 0; i < rows; i++) {
            double scale = 1.0 / param[i];
            Row row = {.logits = (const float *)logits->buf + i * vocab,
                       .vocab = vocab,
                       .scale = scale < DBL_MAX ? scale : DBL_MAX,
                       .top_k = param[rows + i],
                       .top_p = param[2 * rows + i],
                       .min_p = param[3 * rows + i]};
            row.most = largest(&row);
            token[i] = draw_row(&row, param[4 * rows + i], &room);
        }
        Py_END_ALLOW_THREADS;
    }
    PyMem_RawFree(room.weights);
    PyMem_RawFree(room.sums);
    PyMem_RawFree(room.bins);
    release(&buffers);
    if (!has_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

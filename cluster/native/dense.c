/* Small operations of a model's dense part, each in one call and with torch's own bits.
 *
 * router/model/fused_attention.py, router/model/cpu/rms_norm.py and router/model/kv_cache.py are the faces of these functions.
 *
 * Letters: T tokens, N heads, D values of a head (an even number), H values of a row, G key/value
 * heads, S cache slots.
 */
#include "native.h"

#include <math.h>

#include "bfloat16.h"

#define MOST_VALUES (1 << 30) /* of anything that is counted here; no product of two overflows */

/* A head's halves (x, y) become (x cos - y sin, y cos + x sin), each product and sum rounded. */
FOR_EACH_CPU
static void rotate_head(uint16_t *restrict low, uint16_t *restrict high,
                        const uint16_t *restrict cosines, const uint16_t *restrict sines,
                        Py_ssize_t half) {
    for (Py_ssize_t d = 0; d < half; d++) {
        float x = of_bfloat16(low[d]), y = of_bfloat16(high[d]);
        float xc = rounded(x * of_bfloat16(cosines[d])), ys = rounded(-y * of_bfloat16(sines[d]));
        float yc = rounded(y * of_bfloat16(cosines[half + d]));
        float xs = rounded(x * of_bfloat16(sines[half + d]));
        low[d] = to_bfloat16(xc + ys);
        high[d] = to_bfloat16(yc + xs);
    }
}

/* rotate(heads [T, N, D] bfloat16 in and out, cosines [T, D] bfloat16, sines the same, T, D, how
 * many heads of a token are turned, the first ones) */
FUNCTION(rotate) {
    Buffers buffers = {.count = 0};
    Py_buffer *heads, *cosines, *sines;
    if (!are_given(given, 6)) return NULL;
    Py_ssize_t num_tokens = PyLong_AsSsize_t(args[3]), size = PyLong_AsSsize_t(args[4]);
    Py_ssize_t count = PyLong_AsSsize_t(args[5]);
    if (PyErr_Occurred()) return NULL;
    if (!(heads = take(&buffers, args[0], 1))) return NULL;
    if (!(cosines = take(&buffers, args[1], 0))) return NULL;
    if (!(sines = take(&buffers, args[2], 0))) return NULL;
    if (num_tokens < 1 || num_tokens > MOST_VALUES || size < 2 || size % 2 || size > MOST_VALUES)
        return refuse(&buffers, "there must be tokens, and two halves of a head");
    Py_ssize_t head_bytes = size * 2, num_heads = heads->len / head_bytes / num_tokens;
    if (heads->len != num_tokens * head_bytes * num_heads || count < 0 || count > num_heads ||
        cosines->len != num_tokens * head_bytes || sines->len != cosines->len)
        return refuse(&buffers, "there must be as many heads and angles as the sizes say");
    PyThreadState *saved = heads->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t t = 0; t < num_tokens; t++) {
        for (Py_ssize_t n = 0; n < count; n++) {
            uint16_t *head = (uint16_t *)heads->buf + (t * num_heads + n) * size;
            rotate_head(head, head + size / 2, (const uint16_t *)cosines->buf + t * size,
                        (const uint16_t *)sines->buf + t * size, size / 2);
        }
    }
    if (saved) PyEval_RestoreThread(saved);
    release(&buffers);
    Py_RETURN_NONE;
}

/* store(rows, cached [S, G, D] out, slots [T] int64, (G, S, bytes of a head, bytes between two
 * tokens' heads and between two heads of a token)) */
FUNCTION(store) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *cached, *slots_view;
    Py_ssize_t num_heads, num_slots, row_bytes, token_bytes, head_bytes;
    if (!are_given(given, 4)) return NULL;
    if (!PyTuple_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "sizes must be a tuple");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[3], "nnnnn", &num_heads, &num_slots, &row_bytes, &token_bytes,
                          &head_bytes))
        return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(cached = take(&buffers, args[1], 1))) return NULL;
    if (!(slots_view = take(&buffers, args[2], 0))) return NULL;
    Py_ssize_t num_tokens = slots_view->len / 8;
    const int64_t *slots = slots_view->buf;
    if (num_heads < 1 || num_heads > MOST_VALUES || num_slots < 1 || num_tokens < 1 ||
        num_tokens > MOST_VALUES || row_bytes < 1 || row_bytes > MOST_VALUES || token_bytes < 0 ||
        token_bytes > MOST_VALUES || head_bytes < 0 || head_bytes > MOST_VALUES ||
        cached->len / row_bytes / num_heads != num_slots ||
        cached->len % (row_bytes * num_heads) ||
        rows->len < (num_tokens - 1) * token_bytes + (num_heads - 1) * head_bytes + row_bytes)
        return refuse(&buffers, "buffers must be as long as the sizes say");
    for (Py_ssize_t t = 0; t < num_tokens; t++)
        if (slots[t] < 0 || slots[t] >= num_slots)
            return refuse(&buffers, "a slot beyond the cache");
    PyThreadState *saved = rows->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t t = 0; t < num_tokens; t++)
        for (Py_ssize_t g = 0; g < num_heads; g++)
            memcpy((char *)cached->buf + (slots[t] * num_heads + g) * row_bytes,
                   (const char *)rows->buf + t * token_bytes + g * head_bytes, row_bytes);
    if (saved) PyEval_RestoreThread(saved);
    release(&buffers);
    Py_RETURN_NONE;
}

/* gather_heads(cached [S, G, D], slots [N] int64, out [G, N, D], (G, S, bytes of a head)) */
FUNCTION(gather_heads) {
    Buffers buffers = {.count = 0};
    Py_buffer *cached, *slots_view, *out;
    Py_ssize_t num_heads, num_slots, row_bytes;
    if (!are_given(given, 4)) return NULL;
    if (!PyTuple_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "sizes must be a tuple");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[3], "nnn", &num_heads, &num_slots, &row_bytes)) return NULL;
    if (!(cached = take(&buffers, args[0], 0))) return NULL;
    if (!(slots_view = take(&buffers, args[1], 0))) return NULL;
    if (!(out = take(&buffers, args[2], 1))) return NULL;
    Py_ssize_t count = slots_view->len / 8;
    const int64_t *slots = slots_view->buf;
    if (num_heads < 1 || num_heads > MOST_VALUES || num_slots < 1 || row_bytes < 1 ||
        row_bytes > MOST_VALUES || count > MOST_VALUES || slots_view->len % 8 ||
        cached->len / row_bytes / num_heads != num_slots ||
        cached->len % (row_bytes * num_heads) || out->len / row_bytes / num_heads != count ||
        out->len % (row_bytes * num_heads))
        return refuse(&buffers, "buffers must be as long as the sizes say");
    for (Py_ssize_t i = 0; i < count; i++)
        if (slots[i] < 0 || slots[i] >= num_slots)
            return refuse(&buffers, "a slot beyond the cache");
    PyThreadState *saved = out->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t i = 0; i < count; i++)
        for (Py_ssize_t g = 0; g < num_heads; g++)
            memcpy((char *)out->buf + (g * count + i) * row_bytes,
                   (const char *)cached->buf + (slots[i] * num_heads + g) * row_bytes, row_bytes);
    if (saved) PyEval_RestoreThread(saved);
    release(&buffers);
    Py_RETURN_NONE;
}

#define CHAINS 4 /* sums that torch keeps side by side, each of a vector of lanes */
#define LEVELS 4
#define LANES 8 /* whatever the processor has */

static inline void add_squares(float *sums, const uint16_t *values) {
    for (int i = 0; i < LANES; i++) {
        float value = of_bfloat16(values[i]);
        sums[i] += value * value;
    }
}

static inline void add_to(float *sums, const float *others) {
    for (int i = 0; i < LANES; i++) sums[i] += others[i];
}

/* The squares' sum as torch sums a row of float32 (aten/src/ATen/native/cpu/SumKernel.cpp): CHAINS
 * vectors by turns, each cascading over levels, then what is left of vectors, then of values. */
static inline float sum_squares(const uint16_t *row, Py_ssize_t size) {
    float sums[LEVELS][CHAINS][LANES] = {};
    Py_ssize_t num_vectors = size / LANES, num_steps = num_vectors / CHAINS, step = 0;
    int log = 0;
    while (((Py_ssize_t)1 << log) < num_steps) log++;
    int level_bits = log / LEVELS > 4 ? log / LEVELS : 4;
    Py_ssize_t group = (Py_ssize_t)1 << level_bits;
    while (step + group <= num_steps) {
        for (Py_ssize_t end = step + group; step < end; step++)
            for (int c = 0; c < CHAINS; c++)
                add_squares(sums[0][c], row + (step * CHAINS + c) * LANES);
        for (int level = 1; level < LEVELS; level++) {
            for (int c = 0; c < CHAINS; c++) add_to(sums[level][c], sums[level - 1][c]);
            memset(sums[level - 1], 0, sizeof sums[level - 1]);
            if (step & ((group - 1) << (level * level_bits))) break;
        }
    }
    for (; step < num_steps; step++)
        for (int c = 0; c < CHAINS; c++)
            add_squares(sums[0][c], row + (step * CHAINS + c) * LANES);
    for (int level = 1; level < LEVELS; level++)
        for (int c = 0; c < CHAINS; c++) add_to(sums[0][c], sums[level][c]);
    for (Py_ssize_t v = num_steps * CHAINS; v < num_vectors; v++)
        add_squares(sums[0][0], row + v * LANES);
    for (int c = 1; c < CHAINS; c++) add_to(sums[0][0], sums[0][c]);
    float sum = 0;
    for (Py_ssize_t h = num_vectors * LANES; h < size; h++) {
        float value = of_bfloat16(row[h]);
        sum += value * value;
    }
    for (int i = 0; i < LANES; i++) sum += sums[0][0][i];
    return sum;
}

FOR_EACH_CPU
static void normalise(const uint16_t *row, const uint16_t *weights, Py_ssize_t size, float epsilon,
                      uint16_t *out) {
    float factor = 1 / sqrtf(sum_squares(row, size) / (float)size + epsilon);
    for (Py_ssize_t h = 0; h < size; h++)
        out[h] = to_bfloat16(of_bfloat16(weights[h]) * rounded(of_bfloat16(row[h]) * factor));
}

/* normalise(rows [T, H] bfloat16, weights [H] bfloat16, epsilon, out [T, H] bfloat16) */
FUNCTION(normalise) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *weights, *out;
    if (!are_given(given, 4)) return NULL;
    float epsilon = (float)PyFloat_AsDouble(args[2]);
    if (PyErr_Occurred()) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(weights = take(&buffers, args[1], 0))) return NULL;
    if (!(out = take(&buffers, args[3], 1))) return NULL;
    Py_ssize_t row_bytes = weights->len;
    if (row_bytes < 2 || row_bytes % 2 || rows->len % row_bytes || out->len != rows->len)
        return refuse(&buffers, "rows must be as long as the weights");
    PyThreadState *saved = rows->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t at = 0; at < rows->len; at += row_bytes)
        normalise((const uint16_t *)((const char *)rows->buf + at), weights->buf, row_bytes / 2,
                  epsilon, (uint16_t *)((char *)out->buf + at));
    if (saved) PyEval_RestoreThread(saved);
    release(&buffers);
    Py_RETURN_NONE;
}

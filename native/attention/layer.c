/* The dense part of a layer: norms, queries, keys and values, rotation, output and residual.
 *
 * router/model/cpu/native_layer.py is the face of these functions. Everything between two matrices
 * is float32. Each sum has one order, whatever the processor, so a row's result depends on the row
 * and the weights, and on the kernel's class by the products alone.
 *
 * Letters: T tokens, H hidden size, Q query heads, G key/value heads, D values of a head.
 */
#include "linear.h"

#include <math.h>

#include "bfloat16.h"
#include "float16.h"

#define LANES 32 /* sums side by side */
#define MAX_HEADS (1 << 16)

typedef enum { NO_NORM, ROOT_MEAN_SQUARE, LAYER_NORM } Norm;

FOR_EACH_CPU
static void widen(Rows rows, Py_ssize_t begin, Py_ssize_t size, float *out) {
    const char *from = rows.values + begin * bytes_of(rows.format);
    if (rows.format == FLOAT32) {
        memcpy(out, from, size * 4);
        return;
    }
    for (Py_ssize_t i = 0; i < size; i++) {
        uint16_t bits;
        memcpy(&bits, from + i * 2, 2);
        out[i] = rows.format == BFLOAT16 ? of_bfloat16(bits) : of_float16(bits);
    }
}

FOR_EACH_CPU
static void narrow(const float *values, Py_ssize_t size, Format format, char *out) {
    if (format == FLOAT32) {
        memcpy(out, values, size * 4);
        return;
    }
    for (Py_ssize_t i = 0; i < size; i++) {
        uint16_t bits = format == BFLOAT16 ? to_bfloat16(values[i]) : to_float16(values[i]);
        memcpy(out + i * 2, &bits, 2);
    }
}

static inline float total(float *sums) {
    for (int count = LANES / 2; count; count /= 2)
        for (int i = 0; i < count; i++) sums[i] += sums[i + count];
    return sums[0];
}

FOR_EACH_CPU
static float sum_of(const float *values, Py_ssize_t size) {
    float sums[LANES] = {};
    Py_ssize_t whole = size / LANES * LANES;
    for (Py_ssize_t h = 0; h < whole; h += LANES)
        for (int i = 0; i < LANES; i++) sums[i] += values[h + i];
    for (Py_ssize_t h = whole; h < size; h++) sums[h - whole] += values[h];
    return total(sums);
}

FOR_EACH_CPU
static float sum_of_squares(const float *values, Py_ssize_t size, float mean) {
    float sums[LANES] = {};
    Py_ssize_t whole = size / LANES * LANES;
    for (Py_ssize_t h = 0; h < whole; h += LANES)
        for (int i = 0; i < LANES; i++) {
            float value = values[h + i] - mean;
            sums[i] += value * value;
        }
    for (Py_ssize_t h = whole; h < size; h++) {
        float value = values[h] - mean;
        sums[h - whole] += value * value;
    }
    return total(sums);
}

/* Zhang and Sennrich 2019, eq. 4, or Ba et al. 2016, eq. 4 without a bias. */
FOR_EACH_CPU
static void normalise(float *values, Py_ssize_t size, const float *weights, Norm norm,
                      float epsilon) {
    float mean = norm == LAYER_NORM ? sum_of(values, size) / (float)size : 0;
    float factor = 1 / sqrtf(sum_of_squares(values, size, mean) / (float)size + epsilon);
    for (Py_ssize_t h = 0; h < size; h++) values[h] = (values[h] - mean) * factor * weights[h];
}

/* A head's halves (x, y) become (x cos - y sin, y cos + x sin)  (Su et al. 2021). */
FOR_EACH_CPU
static void rotate(float *restrict head, const float *restrict cosines, Py_ssize_t half) {
    const float *restrict sines = cosines + half;
    float *restrict high = head + half;
    for (Py_ssize_t d = 0; d < half; d++) {
        float x = head[d], y = high[d];
        head[d] = x * cosines[d] - y * sines[d];
        high[d] = y * cosines[d] + x * sines[d];
    }
}

static void normalise_rows(Rows rows, Py_ssize_t num_rows, Py_ssize_t size, const float *weights,
                           Norm norm, float epsilon, float *room, char *out, Format out_format) {
    for (Py_ssize_t r = 0; r < num_rows; r++) {
        widen(rows, r * size, size, room);
        normalise(room, size, weights, norm, epsilon);
        narrow(room, size, out_format, out + r * size * bytes_of(out_format));
    }
}

static int is_norm(int number) { return number == ROOT_MEAN_SQUARE || number == LAYER_NORM; }

/* normalise(rows [T, H], weights [H] float32, out [T, H], (H, format of rows, of out, norm),
 * epsilon) */
FUNCTION(normalise) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *weights, *out;
    Py_ssize_t size;
    int row_format, out_format, norm;
    if (!are_given(given, 5)) return NULL;
    if (!PyTuple_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "sizes must be a tuple");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[3], "niii", &size, &row_format, &out_format, &norm)) return NULL;
    float epsilon = (float)PyFloat_AsDouble(args[4]);
    if (PyErr_Occurred()) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(weights = take(&buffers, args[1], 0))) return NULL;
    if (!(out = take(&buffers, args[2], 1))) return NULL;
    if (size < 1 || size > MAX_SIZE || !is_format(row_format) || !is_format(out_format) ||
        !is_norm(norm) || weights->len != size * 4)
        return refuse(&buffers, "there must be a weight for each value of a row");
    Py_ssize_t row_bytes = size * bytes_of((Format)row_format);
    Py_ssize_t num_rows = rows->len / row_bytes, out_bytes = size * bytes_of((Format)out_format);
    if (rows->len % row_bytes || out->len / out_bytes != num_rows || out->len % out_bytes)
        return refuse(&buffers, "there must be whole rows, and as many of them in out");
    float *room = PyMem_RawMalloc(size * sizeof *room);
    if (!room) {
        release(&buffers);
        return PyErr_NoMemory();
    }
    PyThreadState *saved = rows->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    normalise_rows((Rows){rows->buf, (Format)row_format}, num_rows, size, weights->buf, (Norm)norm,
                   epsilon, room, out->buf, (Format)out_format);
    if (saved) PyEval_RestoreThread(saved);
    PyMem_RawFree(room);
    release(&buffers);
    Py_RETURN_NONE;
}

/* What becomes of a token's queries, keys and values. */
typedef struct {
    Py_ssize_t num_q, num_kv, size;
    const float *angles; /* [T, 2, D / 2]: cosines, then sines */
    const float *head_weights; /* of queries, then of keys */
    Py_ssize_t q_norm_size, k_norm_size; /* values that are normalised together, or 0 */
    float epsilon, clip;
} Heads;

FOR_EACH_CPU
static void clip(float *values, Py_ssize_t size, float most) {
    for (Py_ssize_t i = 0; i < size; i++) {
        float value = values[i] > most ? most : values[i];
        values[i] = value < -most ? -most : value;
    }
}

/* Finish the sums [Q + 2 G, D] of token `token`. */
static void finish_heads(const Heads *h, Py_ssize_t token, float *sums) {
    Py_ssize_t queries = h->num_q * h->size, keys = h->num_kv * h->size;
    for (Py_ssize_t i = 0; h->q_norm_size && i < queries; i += h->q_norm_size)
        normalise(sums + i, h->q_norm_size, h->head_weights, ROOT_MEAN_SQUARE, h->epsilon);
    for (Py_ssize_t i = 0; h->k_norm_size && i < keys; i += h->k_norm_size)
        normalise(sums + queries + i, h->k_norm_size, h->head_weights + h->q_norm_size,
                  ROOT_MEAN_SQUARE, h->epsilon);
    if (isfinite(h->clip)) clip(sums, queries + 2 * keys, h->clip);
    for (Py_ssize_t n = 0; n < h->num_q + h->num_kv; n++)
        rotate(sums + n * h->size, h->angles + token * h->size, h->size / 2);
}

static int are_heads(const Heads *h) {
    return h->num_q >= 1 && h->num_q <= MAX_HEADS && h->num_kv >= 1 && h->num_kv <= MAX_HEADS &&
           h->size >= 2 && h->size <= MAX_HEADS && h->size % 2 == 0 &&
           (h->num_q + 2 * h->num_kv) * h->size <= MAX_SIZE && h->q_norm_size >= 0 &&
           h->k_norm_size >= 0 && !h->q_norm_size == !h->k_norm_size &&
           (!h->q_norm_size || (h->num_q * h->size % h->q_norm_size == 0 &&
                                h->num_kv * h->size % h->k_norm_size == 0));
}

#define PIECE_ROWS 96 /* rows whose sums are kept in float32 */

/* attention_inputs(rows [T, H], weights of the norm [H] float32, packed, angles [T, 2, D / 2]
 * float32, weights of the heads' norms float32 or None, out [T, Q + 2 G, D], (H, Q, G, D, format of
 * the weights, of the rows, whether there is a bias, norm, values of queries and of keys that are
 * normalised together), (epsilon of the norm, of the heads' norms, clip), most threads, kernel or
 * None): queries, keys and values of normalised rows; queries and keys are rotated */
FUNCTION(attention_inputs) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *weights, *packed, *angles, *head_weights = NULL, *out;
    Py_ssize_t hidden;
    int format, row_format, has_bias, norm;
    float epsilon;
    Heads heads = {0};
    if (!are_given(given, 10)) return NULL;
    if (!PyTuple_CheckExact(args[6]) || !PyTuple_CheckExact(args[7])) {
        PyErr_SetString(PyExc_TypeError, "sizes must be tuples");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[6], "nnnniiiinn", &hidden, &heads.num_q, &heads.num_kv, &heads.size,
                          &format, &row_format, &has_bias, &norm, &heads.q_norm_size,
                          &heads.k_norm_size) ||
        !PyArg_ParseTuple(args[7], "fff", &epsilon, &heads.epsilon, &heads.clip))
        return NULL;
    Py_ssize_t threads = PyLong_AsSsize_t(args[8]);
    if (PyErr_Occurred()) return NULL;
    const Kernel *kernel = kernel_named(args[9]);
    if (!kernel) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(weights = take(&buffers, args[1], 0))) return NULL;
    if (!(packed = take(&buffers, args[2], 0))) return NULL;
    if (!(angles = take(&buffers, args[3], 0))) return NULL;
    if (args[4] != Py_None && !(head_weights = take(&buffers, args[4], 0))) return NULL;
    if (!(out = take(&buffers, args[5], 1))) return NULL;
    if (!are_heads(&heads) || !is_format(row_format) || !is_norm(norm) || threads < 1 ||
        hidden < 1 || hidden > MAX_SIZE || weights->len != hidden * 4 ||
        (head_weights ? head_weights->len : 0) != (heads.q_norm_size + heads.k_norm_size) * 4)
        return refuse(&buffers, "sizes must be positive, and weights as they say");
    Py_ssize_t outputs = (heads.num_q + 2 * heads.num_kv) * heads.size;
    Matrix matrix;
    if (!take_matrix(packed, hidden, outputs, format, has_bias, &matrix)) {
        release(&buffers);
        return NULL;
    }
    Py_ssize_t bytes = bytes_of((Format)row_format), num_rows = rows->len / (hidden * bytes);
    if (rows->len % (hidden * bytes) || out->len / (outputs * bytes) != num_rows ||
        out->len % (outputs * bytes) || angles->len / (heads.size * 4) != num_rows ||
        angles->len % (heads.size * 4))
        return refuse(&buffers, "there must be whole rows, and angles and room for each");
    heads.angles = angles->buf;
    heads.head_weights = head_weights ? head_weights->buf : NULL;
    Py_ssize_t most = num_rows < PIECE_ROWS ? num_rows : PIECE_ROWS;
    float *sums = PyMem_RawMalloc((most * (outputs + hidden) + hidden + 1) * sizeof *sums);
    int has_memory = sums != NULL;
    PyThreadState *saved = PyEval_SaveThread();
    float *room = sums + most * outputs;
    char *normed = (char *)(room + hidden);
    for (Py_ssize_t begin = 0; has_memory && begin < num_rows; begin += most) {
        Py_ssize_t count = num_rows - begin < most ? num_rows - begin : most;
        Rows piece = {(char *)rows->buf + begin * hidden * bytes, (Format)row_format};
        Rows inputs = {normed, (Format)row_format}, none = {NULL, FLOAT32};
        normalise_rows(piece, count, hidden, weights->buf, (Norm)norm, epsilon, room, normed,
                       (Format)row_format);
        has_memory = multiply_rows(kernel, &matrix, inputs, count, none, (char *)sums, FLOAT32,
                                   threads);
        for (Py_ssize_t t = 0; has_memory && t < count; t++) {
            finish_heads(&heads, begin + t, sums + t * outputs);
            narrow(sums + t * outputs, outputs, (Format)row_format,
                   (char *)out->buf + (begin + t) * outputs * bytes);
        }
    }
    PyEval_RestoreThread(saved);
    PyMem_RawFree(sums);
    release(&buffers);
    return has_memory ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

/* attention_outputs(attended [T, K], packed, residual [T, H], weights of the norm [H] float32, sums
 * [T, H] out, normed [T, H] out, (K, H, format of the weights, of the rows, whether there is a bias,
 * norm), epsilon, most threads, kernel or None): the product plus the residual, and its norm; `sums`
 * may be the residual's memory */
FUNCTION(attention_outputs) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *packed, *residual, *weights, *sums, *normed;
    Py_ssize_t size, hidden;
    int format, row_format, has_bias, norm;
    if (!are_given(given, 10)) return NULL;
    if (!PyTuple_CheckExact(args[6])) {
        PyErr_SetString(PyExc_TypeError, "sizes must be a tuple");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[6], "nniiii", &size, &hidden, &format, &row_format, &has_bias,
                          &norm))
        return NULL;
    float epsilon = (float)PyFloat_AsDouble(args[7]);
    Py_ssize_t threads = PyErr_Occurred() ? -1 : PyLong_AsSsize_t(args[8]);
    if (PyErr_Occurred()) return NULL;
    const Kernel *kernel = kernel_named(args[9]);
    if (!kernel) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(packed = take(&buffers, args[1], 0))) return NULL;
    if (!(residual = take(&buffers, args[2], 0))) return NULL;
    if (!(weights = take(&buffers, args[3], 0))) return NULL;
    if (!(sums = take(&buffers, args[4], 1))) return NULL;
    if (!(normed = take(&buffers, args[5], 1))) return NULL;
    Matrix matrix;
    if (!take_matrix(packed, size, hidden, format, has_bias, &matrix)) {
        release(&buffers);
        return NULL;
    }
    if (!is_format(row_format) || !is_norm(norm) || threads < 1 || weights->len != hidden * 4)
        return refuse(&buffers, "there must be a weight for each value of a row");
    Py_ssize_t bytes = bytes_of((Format)row_format), num_rows = rows->len / (size * bytes);
    if (rows->len % (size * bytes) || residual->len / (hidden * bytes) != num_rows ||
        residual->len % (hidden * bytes) || sums->len != residual->len ||
        normed->len != residual->len)
        return refuse(&buffers, "there must be whole rows, and as many of each");
    float *room = PyMem_RawMalloc(hidden * sizeof *room);
    int has_memory = room != NULL;
    PyThreadState *saved = PyEval_SaveThread();
    Rows inputs = {rows->buf, (Format)row_format}, added = {residual->buf, (Format)row_format};
    has_memory = has_memory && multiply_rows(kernel, &matrix, inputs, num_rows, added, sums->buf,
                                             (Format)row_format, threads);
    if (has_memory)
        normalise_rows((Rows){sums->buf, (Format)row_format}, num_rows, hidden, weights->buf,
                       (Norm)norm, epsilon, room, normed->buf, (Format)row_format);
    PyEval_RestoreThread(saved);
    PyMem_RawFree(room);
    release(&buffers);
    return has_memory ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

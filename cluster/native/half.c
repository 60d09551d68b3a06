/* The first half of a layer in one call: attention_inputs, store, attend and attention_outputs.
 *
 * router/model/cpu/native_layer.py is the face of this function. The functions of layer.c and
 * attention.c are called one after the other, as Python would, and each checks its arguments. At one
 * stream most of a layer's time outside its products is the interpreter between two such calls, since
 * other processes have had the caches meanwhile.
 *
 * Letters as in layer.c.
 */
#include "native.h"

#define MOST_NUMBER (1 << 16) /* of heads, and of values of a head: no product of sizes overflows */
#define MOST_TOKENS (1 << 28)

/* What is the same in every step, by its place in a tuple. */
enum {
    NORM,        /* weights of the norm, as attention_inputs takes them */
    INPUTS,      /* packed */
    HEAD_NORMS,  /* or None */
    INPUT_SIZES,
    INPUT_FACTORS,
    KEYS,        /* the cache's, of all pages */
    VALUES,
    KEY_SIZES,   /* as store takes them */
    VALUE_SIZES,
    HEADS,       /* (format, bytes of a value, N, G, Q, D) */
    SCORING,     /* as attend takes it */
    SINKS,       /* or None */
    KERNEL,      /* of attend, or None */
    OUTPUT,      /* packed, as attention_outputs takes it */
    NEXT_NORM,
    OUTPUT_SIZES,
    EPSILON,
    NUM_PARTS
};

/* Memory between the calls, and the result's two halves. */
enum { ALL_HEADS, NEW_KEYS, NEW_VALUES, ATTENDED, SUMS, NORMED, NUM_VIEWS };

/* Call a function of this module; 0 with an error set. */
static int call(PyObject *(*function)(PyObject *, PyObject *const *, Py_ssize_t),
                PyObject *const *args, Py_ssize_t count) {
    PyObject *result = function(NULL, args, count);
    Py_XDECREF(result);
    return result != NULL;
}

/* Compute the half; 0 with an error set. `args` are those of attention_half. */
static int compute(PyObject *const *args, PyObject *const *part, PyObject *const *view,
                   PyObject *sizes) {
    PyObject *rows = args[0], *angles = args[1], *slots = args[2], *threads = args[7];
    PyObject *const inputs[] = {rows,          part[NORM],        part[INPUTS],        angles,
                                part[HEAD_NORMS], view[ALL_HEADS], part[INPUT_SIZES],
                                part[INPUT_FACTORS], threads,      Py_None};
    PyObject *const keys[] = {view[NEW_KEYS], part[KEYS], slots, part[KEY_SIZES]};
    PyObject *const values[] = {view[NEW_VALUES], part[VALUES], slots, part[VALUE_SIZES]};
    PyObject *const attention[] = {view[ALL_HEADS], part[KEYS], part[VALUES],   args[3],
                                   args[4],         view[ATTENDED], sizes,      part[SCORING],
                                   part[SINKS],     threads,    part[KERNEL]};
    PyObject *const outputs[] = {view[ATTENDED], part[OUTPUT], rows,
                                 part[NEXT_NORM], view[SUMS],  view[NORMED],
                                 part[OUTPUT_SIZES], part[EPSILON], threads, Py_None};
    return call(native_attention_inputs, inputs, 10) && call(native_store, keys, 4) &&
           call(native_store, values, 4) && call(native_attend, attention, 11) &&
           call(native_attention_outputs, outputs, 10);
}

/* attention_half(rows [T, H], angles [T, 2, D / 2] float32, slots [T] int64, spans and pages as
 * attend takes them, out [2, T, H]: the residual stream after attention, and its norm; parts, most
 * threads) */
FUNCTION(attention_half) {
    Buffers buffers = {.count = 0};
    Py_buffer *slots, *out;
    Py_ssize_t format, value_bytes, num_pages, num_kv, num_q, size;
    if (!are_given(given, 8)) return NULL;
    PyObject *parts = args[6];
    if (!PyTuple_CheckExact(parts) || PyTuple_GET_SIZE(parts) != NUM_PARTS ||
        !PyTuple_CheckExact(PyTuple_GET_ITEM(parts, HEADS))) {
        PyErr_SetString(PyExc_TypeError, "parts must be a tuple with all parts of a layer");
        return NULL;
    }
    PyObject *const *part = &PyTuple_GET_ITEM(parts, 0);
    if (!PyArg_ParseTuple(part[HEADS], "nnnnnn", &format, &value_bytes, &num_pages, &num_kv, &num_q,
                          &size))
        return NULL;
    if (!(slots = take(&buffers, args[2], 0))) return NULL;
    if (!(out = take(&buffers, args[5], 1))) return NULL;
    Py_ssize_t num_tokens = slots->len / 8;
    if (num_tokens < 1 || num_tokens > MOST_TOKENS || value_bytes < 1 || value_bytes > 4 ||
        num_kv < 1 || num_q < 1 || size < 1 || num_kv > MOST_NUMBER || num_q > MOST_NUMBER ||
        size > MOST_NUMBER || num_q + 2 * num_kv > MOST_NUMBER / size * 256 || out->len % 2)
        return refuse(&buffers, "there must be tokens and heads, and room for two rows a token");
    Py_ssize_t queries = num_q * size, stride = queries + 2 * num_kv * size;
    Py_ssize_t head_bytes = num_tokens * stride * value_bytes;
    Py_ssize_t attended_bytes = num_tokens * queries * value_bytes, half = out->len / 2;
    char *heads = PyMem_RawMalloc(head_bytes + attended_bytes), *to = out->buf;
    Py_ssize_t keys_at = queries * value_bytes, values_at = (queries + num_kv * size) * value_bytes;
    PyObject *views[NUM_VIEWS] = {NULL};
    int is_done = 0;
    if (!heads) {
        PyErr_NoMemory();
    } else if ((views[ALL_HEADS] = view_of(Py_None, heads, head_bytes)) &&
               (views[NEW_KEYS] = view_of(Py_None, heads + keys_at, head_bytes - keys_at)) &&
               (views[NEW_VALUES] = view_of(Py_None, heads + values_at, head_bytes - values_at)) &&
               (views[ATTENDED] = view_of(Py_None, heads + head_bytes, attended_bytes)) &&
               (views[SUMS] = view_of(Py_None, to, half)) &&
               (views[NORMED] = view_of(Py_None, to + half, half))) {
        PyObject *sizes = Py_BuildValue("nnnnnnnnn", format, num_tokens, num_pages, num_kv, num_q,
                                        size, size, stride, size);
        is_done = sizes && compute(args, part, views, sizes);
        Py_XDECREF(sizes);
    }
    for (int i = 0; i < NUM_VIEWS; i++) Py_XDECREF(views[i]);
    PyMem_RawFree(heads);
    release(&buffers);
    return is_done ? Py_NewRef(Py_None) : NULL;
}

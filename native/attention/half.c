/* The first half of a layer in one call: the last layer's output is added to the residual stream, then
 * attention_inputs, store, attend and attention_outputs.
 *
 * router/model/cpu/native_layer.py is the face of this function. The functions of layer.c and
 * attention.c are called one after the other, as Python would, and each checks its arguments. At one
 * stream most of a layer's time outside its products is the interpreter between two such calls, since
 * other processes have had the caches meanwhile.
 *
 * Letters as in layer.c.
 */
#include "native.h"

#include "bfloat16.h"
#include "float16.h"
#include "kernels.h"

#define MAX_NUMBER (1 << 16) /* of heads, and of values of a head: no product of sizes overflows */
#define MAX_TOKENS (1 << 28)

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

/* Memory between the calls. */
enum { ALL_HEADS, NEW_KEYS, NEW_VALUES, ATTENDED, NUM_VIEWS };

/* Add `count` values of a format to others; a sum is rounded once, as torch rounds it. */
FOR_EACH_CPU static void add(void *restrict to, const void *restrict from, Py_ssize_t count,
                             Format format) {
    if (format == FLOAT32) {
        float *sums = to;
        const float *added = from;
        for (Py_ssize_t i = 0; i < count; i++) sums[i] += added[i];
        return;
    }
    uint16_t *sums = to;
    const uint16_t *added = from;
    if (format == BFLOAT16)
        for (Py_ssize_t i = 0; i < count; i++)
            sums[i] = to_bfloat16(of_bfloat16(sums[i]) + of_bfloat16(added[i]));
    else
        for (Py_ssize_t i = 0; i < count; i++)
            sums[i] = to_float16(of_float16(sums[i]) + of_float16(added[i]));
}

/* Add the last layer's output to the residual stream; 0 with an error set. */
static int add_output(PyObject *rows, PyObject *output, Py_ssize_t format, Py_ssize_t value_bytes) {
    Buffers buffers = {.count = 0};
    Py_buffer *to, *from;
    if (!(to = take(&buffers, rows, 1))) return 0;
    if (!(from = take(&buffers, output, 0))) return 0;
    if (format < FLOAT32 || format > FLOAT16 || value_bytes != bytes_of((Format)format) ||
        to->len != from->len || to->len % value_bytes) {
        refuse(&buffers, "there must be as many values of the output as of the residual stream");
        return 0;
    }
    PyThreadState *saved = to->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    add(to->buf, from->buf, to->len / value_bytes, (Format)format);
    if (saved) PyEval_RestoreThread(saved);
    release(&buffers);
    return 1;
}

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
    PyObject *rows = args[0], *angles = args[2], *slots = args[3], *threads = args[8];
    PyObject *const inputs[] = {rows,          part[NORM],        part[INPUTS],        angles,
                                part[HEAD_NORMS], view[ALL_HEADS], part[INPUT_SIZES],
                                part[INPUT_FACTORS], threads,      Py_None};
    PyObject *const keys[] = {view[NEW_KEYS], part[KEYS], slots, part[KEY_SIZES]};
    PyObject *const values[] = {view[NEW_VALUES], part[VALUES], slots, part[VALUE_SIZES]};
    PyObject *const attention[] = {view[ALL_HEADS], part[KEYS], part[VALUES],   args[4],
                                   args[5],         view[ATTENDED], sizes,      part[SCORING],
                                   part[SINKS],     threads,    part[KERNEL]};
    PyObject *const outputs[] = {view[ATTENDED], part[OUTPUT], rows,
                                 part[NEXT_NORM], rows,        args[6],
                                 part[OUTPUT_SIZES], part[EPSILON], threads, Py_None};
    return call(native_attention_inputs, inputs, 10) && call(native_store, keys, 4) &&
           call(native_store, values, 4) && call(native_attend, attention, 11) &&
           call(native_attention_outputs, outputs, 10);
}

/* attention_half(residual stream [T, H], the last layer's output [T, H] or None, angles
 * [T, 2, D / 2] float32, slots [T] int64, spans and pages as attend takes them, out [T, H]: the norm
 * of the residual stream after attention, parts, most threads); the residual stream is written */
FUNCTION(attention_half) {
    Buffers buffers = {.count = 0};
    Py_buffer *slots;
    Py_ssize_t format, value_bytes, num_pages, num_kv, num_q, size;
    if (!are_given(given, 9)) return NULL;
    PyObject *parts = args[7];
    if (!PyTuple_CheckExact(parts) || PyTuple_GET_SIZE(parts) != NUM_PARTS ||
        !PyTuple_CheckExact(PyTuple_GET_ITEM(parts, HEADS))) {
        PyErr_SetString(PyExc_TypeError, "parts must be a tuple with all parts of a layer");
        return NULL;
    }
    PyObject *const *part = &PyTuple_GET_ITEM(parts, 0);
    if (!PyArg_ParseTuple(part[HEADS], "nnnnnn", &format, &value_bytes, &num_pages, &num_kv, &num_q,
                          &size))
        return NULL;
    if (!(slots = take(&buffers, args[3], 0))) return NULL;
    Py_ssize_t num_tokens = slots->len / 8;
    if (num_tokens < 1 || num_tokens > MAX_TOKENS || value_bytes < 1 || value_bytes > 4 ||
        num_kv < 1 || num_q < 1 || size < 1 || num_kv > MAX_NUMBER || num_q > MAX_NUMBER ||
        size > MAX_NUMBER || num_q + 2 * num_kv > MAX_NUMBER / size * 256)
        return refuse(&buffers, "there must be tokens and heads");
    Py_ssize_t queries = num_q * size, stride = queries + 2 * num_kv * size;
    Py_ssize_t head_bytes = num_tokens * stride * value_bytes;
    Py_ssize_t attended_bytes = num_tokens * queries * value_bytes;
    if (args[1] != Py_None && !add_output(args[0], args[1], format, value_bytes)) {
        release(&buffers);
        return NULL;
    }
    char *heads = PyMem_RawMalloc(head_bytes + attended_bytes);
    Py_ssize_t keys_at = queries * value_bytes, values_at = (queries + num_kv * size) * value_bytes;
    PyObject *views[NUM_VIEWS] = {NULL};
    int is_done = 0;
    if (!heads) {
        PyErr_NoMemory();
    } else if ((views[ALL_HEADS] = view_of(Py_None, heads, head_bytes)) &&
               (views[NEW_KEYS] = view_of(Py_None, heads + keys_at, head_bytes - keys_at)) &&
               (views[NEW_VALUES] = view_of(Py_None, heads + values_at, head_bytes - values_at)) &&
               (views[ATTENDED] = view_of(Py_None, heads + head_bytes, attended_bytes))) {
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

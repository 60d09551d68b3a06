/* Moving and adding rows of a layer, without the cost of a dozen small array operations.
 *
 * Module expertmesh_native; router/rows.py is its face, says what each function means, and does
 * the same with numpy and torch where this is not built. Whatever comes in is checked against the
 * lengths of the buffers: a wrong number is a ValueError, never an access beyond them.
 *
 * Letters: T tokens, K experts per token, P = T * K pairs, E experts, H values of a row.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define ALONE_BYTES (1 << 18) /* more than this is moved without holding the interpreter */

#define MOST_EXPERTS (1 << 20) /* of a token; and most bytes of a row: no product overflows */
#define MOST_ROW_BYTES (1 << 30)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

typedef struct {
    Py_buffer views[5];
    int count;
} Buffers;

static void release(Buffers *buffers) {
    while (buffers->count) PyBuffer_Release(&buffers->views[--buffers->count]);
}

/* Take a contiguous buffer; NULL with an error set, and all before it released, if it is none. */
static Py_buffer *take(Buffers *buffers, PyObject *from, int is_output) {
    Py_buffer *view = &buffers->views[buffers->count];
    if (PyObject_GetBuffer(from, view, is_output ? PyBUF_WRITABLE : PyBUF_SIMPLE)) {
        release(buffers);
        return NULL;
    }
    buffers->count++;
    return view;
}

static PyObject *refuse(Buffers *buffers, const char *why) {
    release(buffers);
    PyErr_SetString(PyExc_ValueError, why);
    return NULL;
}

static int are_given(Py_ssize_t given, Py_ssize_t wanted) {
    if (given == wanted) return 1;
    PyErr_Format(PyExc_TypeError, "takes %zd arguments (given: %zd)", wanted, given);
    return 0;
}

/* slots(ids [T, K] int64, k, slots [P] int64 out) */
static PyObject *slots(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Buffers buffers = {.count = 0};
    Py_buffer *ids_view, *slots_view;
    if (!are_given(given, 3)) return NULL;
    Py_ssize_t k = PyLong_AsSsize_t(args[1]);
    if (k == -1 && PyErr_Occurred()) return NULL;
    if (!(ids_view = take(&buffers, args[0], 0))) return NULL;
    if (!(slots_view = take(&buffers, args[2], 1))) return NULL;
    Py_ssize_t num_pairs = ids_view->len / 8;
    if (k < 1 || num_pairs % k || slots_view->len != ids_view->len)
        return refuse(&buffers, "ids and slots must have K for each token");
    const int64_t *ids = ids_view->buf;
    int64_t *to = slots_view->buf;
    for (Py_ssize_t begin = 0; begin < num_pairs; begin += k) {
        for (Py_ssize_t i = 0; i < k; i++) {
            Py_ssize_t place = begin;
            for (Py_ssize_t j = 0; j < k; j++)
                place += ids[begin + j] < ids[begin + i] ||
                         (ids[begin + j] == ids[begin + i] && j < i);
            to[begin + i] = place;
        }
    }
    release(&buffers);
    Py_RETURN_NONE;
}

/* route(ids [P] int64, k, place_of [E] int64, pairs int64, ordered int64 out) -> counts, a list */
static PyObject *route(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Buffers buffers = {.count = 0};
    Py_buffer *ids_view, *places_view, *pairs_view, *ordered_view;
    if (!are_given(given, 5)) return NULL;
    Py_ssize_t k = PyLong_AsSsize_t(args[1]);
    if (k == -1 && PyErr_Occurred()) return NULL;
    if (!(ids_view = take(&buffers, args[0], 0))) return NULL;
    if (!(places_view = take(&buffers, args[2], 0))) return NULL;
    if (!(pairs_view = take(&buffers, args[3], 0))) return NULL;
    if (!(ordered_view = take(&buffers, args[4], 1))) return NULL;
    Py_ssize_t num_ids = ids_view->len / 8, num_experts = places_view->len / 8;
    Py_ssize_t num_pairs = pairs_view->len / 8, num_places = num_experts * k;
    if (k < 1 || k > MOST_EXPERTS || ordered_view->len != pairs_view->len)
        return refuse(&buffers, "there must be as much room as pairs, and experts for each token");
    const int64_t *ids = ids_view->buf, *place_of = places_view->buf, *pairs = pairs_view->buf;
    int64_t *ordered = ordered_view->buf;
    for (Py_ssize_t i = 0; i < num_experts; i++)
        if (place_of[i] < 0 || place_of[i] >= num_experts)
            return refuse(&buffers, "a place beyond the experts");
    Py_ssize_t *next = PyMem_Calloc(num_places + 1, sizeof *next);
    if (!next) {
        release(&buffers);
        return PyErr_NoMemory();
    }
    /* By expert's place, then by rank; within both in the order of the pairs. */
    for (Py_ssize_t i = 0; i < num_pairs; i++) {
        int64_t pair = pairs[i];
        if (pair < 0 || pair >= num_ids || ids[pair] < 0 || ids[pair] >= num_experts) {
            PyMem_Free(next);
            return refuse(&buffers, "a pair beyond the ids, or an id beyond the experts");
        }
        next[place_of[ids[pair]] * k + pair % k + 1]++;
    }
    for (Py_ssize_t i = 0; i < num_places; i++) next[i + 1] += next[i];
    PyObject *counts = PyList_New(num_experts);
    for (Py_ssize_t place = 0; counts && place < num_experts; place++) {
        PyObject *count = PyLong_FromSsize_t(next[(place + 1) * k] - next[place * k]);
        if (count)
            PyList_SET_ITEM(counts, place, count);
        else
            Py_CLEAR(counts);
    }
    if (counts) {
        for (Py_ssize_t i = 0; i < num_pairs; i++) {
            int64_t pair = pairs[i];
            ordered[next[place_of[ids[pair]] * k + pair % k]++] = pair;
        }
    }
    PyMem_Free(next);
    release(&buffers);
    return counts;
}

/* gather(rows, ordered int64, k, row_bytes) -> the bytes of row ordered[i] / k for each i */
static PyObject *gather(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *ordered_view;
    if (!are_given(given, 4)) return NULL;
    Py_ssize_t k = PyLong_AsSsize_t(args[2]), row_bytes = PyLong_AsSsize_t(args[3]);
    if (PyErr_Occurred()) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(ordered_view = take(&buffers, args[1], 0))) return NULL;
    Py_ssize_t count = ordered_view->len / 8;
    const int64_t *ordered = ordered_view->buf;
    if (k < 1 || k > MOST_EXPERTS || row_bytes < 1 || row_bytes > MOST_ROW_BYTES ||
        rows->len % row_bytes)
        return refuse(&buffers, "rows must be whole, and of one token at least");
    Py_ssize_t end = rows->len / row_bytes * k;
    for (Py_ssize_t i = 0; i < count; i++)
        if (ordered[i] < 0 || ordered[i] >= end) return refuse(&buffers, "a pair beyond the rows");
    PyObject *gathered = PyBytes_FromStringAndSize(NULL, count * row_bytes);
    if (gathered) {
        char *to = PyBytes_AS_STRING(gathered);
        const char *from = rows->buf;
        PyThreadState *saved = count * row_bytes > ALONE_BYTES ? PyEval_SaveThread() : NULL;
        for (Py_ssize_t i = 0; i < count; i++)
            memcpy(to + i * row_bytes, from + ordered[i] / k * row_bytes, row_bytes);
        if (saved) PyEval_RestoreThread(saved);
    }
    release(&buffers);
    return gathered;
}

/* scatter(rows, pairs int64, slots int64, output out, row_bytes): row i to slots[pairs[i]] */
static PyObject *scatter(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *pairs_view, *slots_view, *output;
    if (!are_given(given, 5)) return NULL;
    Py_ssize_t row_bytes = PyLong_AsSsize_t(args[4]);
    if (row_bytes == -1 && PyErr_Occurred()) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(pairs_view = take(&buffers, args[1], 0))) return NULL;
    if (!(slots_view = take(&buffers, args[2], 0))) return NULL;
    if (!(output = take(&buffers, args[3], 1))) return NULL;
    Py_ssize_t count = pairs_view->len / 8, num_slots = slots_view->len / 8;
    const int64_t *pairs = pairs_view->buf, *slots = slots_view->buf;
    if (row_bytes < 1 || row_bytes > MOST_ROW_BYTES || rows->len != count * row_bytes ||
        output->len != num_slots * row_bytes)
        return refuse(&buffers, "there must be a row for each pair, and one for each slot");
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t pair = pairs[i];
        if (pair < 0 || pair >= num_slots || slots[pair] < 0 || slots[pair] >= num_slots)
            return refuse(&buffers, "a pair or a slot beyond the output");
    }
    const char *from = rows->buf;
    char *to = output->buf;
    PyThreadState *saved = rows->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t i = 0; i < count; i++)
        memcpy(to + slots[pairs[i]] * row_bytes, from + i * row_bytes, row_bytes);
    if (saved) PyEval_RestoreThread(saved);
    release(&buffers);
    Py_RETURN_NONE;
}

static inline float of_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

/* Round to the nearest, ties to even. */
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t rounded = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

FOR_EACH_CPU
static void add_bfloat16(uint16_t *sum, const uint16_t *row, float weight, Py_ssize_t size,
                         int is_first) {
    if (is_first) {
        for (Py_ssize_t h = 0; h < size; h++) sum[h] = to_bfloat16(of_bfloat16(row[h]) * weight);
        return;
    }
    for (Py_ssize_t h = 0; h < size; h++) {
        uint16_t weighted = to_bfloat16(of_bfloat16(row[h]) * weight);
        sum[h] = to_bfloat16(of_bfloat16(sum[h]) + of_bfloat16(weighted));
    }
}

/* Contraction to one rounding is off (pyproject.toml), or the sum would have other bits. */
FOR_EACH_CPU
static void add_float32(float *sum, const float *row, float weight, Py_ssize_t size,
                        int is_first) {
    if (is_first) {
        for (Py_ssize_t h = 0; h < size; h++) sum[h] = row[h] * weight;
        return;
    }
    for (Py_ssize_t h = 0; h < size; h++) {
        float weighted = row[h] * weight;
        sum[h] = sum[h] + weighted;
    }
}

/* combine(rows [P, H], weights [P], slots [P] int64, k, sums [T, H] out, value_bytes): values of
 * two bytes are bfloat16, those of four float32, and so are weights, whatever rows are. */
static PyObject *combine(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *weights, *slots_view, *sums;
    if (!are_given(given, 6)) return NULL;
    Py_ssize_t k = PyLong_AsSsize_t(args[3]), value_bytes = PyLong_AsSsize_t(args[5]);
    if (PyErr_Occurred()) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(weights = take(&buffers, args[1], 0))) return NULL;
    if (!(slots_view = take(&buffers, args[2], 0))) return NULL;
    if (!(sums = take(&buffers, args[4], 1))) return NULL;
    Py_ssize_t num_pairs = slots_view->len / 8;
    if (k < 1 || num_pairs < 1 || num_pairs % k || rows->len != sums->len * k ||
        (value_bytes != 2 && value_bytes != 4))
        return refuse(&buffers, "there must be K rows for each sum, of two or four bytes a value");
    Py_ssize_t weight_bytes = weights->len / num_pairs, row_bytes = rows->len / num_pairs;
    if (weights->len % num_pairs || (weight_bytes != 2 && weight_bytes != 4) ||
        rows->len % num_pairs || row_bytes % value_bytes)
        return refuse(&buffers, "there must be a weight and a row for each pair");
    const int64_t *slots = slots_view->buf;
    for (Py_ssize_t begin = 0; begin < num_pairs; begin += k)
        for (Py_ssize_t i = begin; i < begin + k; i++)
            if (slots[i] < begin || slots[i] >= begin + k)
                return refuse(&buffers, "a slot that is another token's");
    Py_ssize_t size = row_bytes / value_bytes;
    PyThreadState *saved = rows->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t begin = 0; begin < num_pairs; begin += k) {
        char *sum = (char *)sums->buf + begin / k * row_bytes;
        for (Py_ssize_t slot = begin; slot < begin + k; slot++) {
            Py_ssize_t pair = begin;
            while (pair < begin + k - 1 && slots[pair] != slot) pair++;
            float weight = weight_bytes == 4 ? ((const float *)weights->buf)[pair]
                                             : of_bfloat16(((const uint16_t *)weights->buf)[pair]);
            const char *row = (const char *)rows->buf + slot * row_bytes;
            if (value_bytes == 4)
                add_float32((float *)sum, (const float *)row, weight, size, slot == begin);
            else
                add_bfloat16((uint16_t *)sum, (const uint16_t *)row, weight, size, slot == begin);
        }
    }
    if (saved) PyEval_RestoreThread(saved);
    release(&buffers);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"slots", (PyCFunction)(void (*)(void))slots, METH_FASTCALL, "See router.rows.slots_of."},
    {"route", (PyCFunction)(void (*)(void))route, METH_FASTCALL, "See router.rows.route."},
    {"gather", (PyCFunction)(void (*)(void))gather, METH_FASTCALL, "See router.rows.gather."},
    {"scatter", (PyCFunction)(void (*)(void))scatter, METH_FASTCALL, "See router.rows.scatter."},
    {"combine", (PyCFunction)(void (*)(void))combine, METH_FASTCALL, "See router.combine."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "expertmesh_native", "Rows of a layer, natively.", -1, functions,
};

PyMODINIT_FUNC PyInit_expertmesh_native(void) { return PyModule_Create(&module); }

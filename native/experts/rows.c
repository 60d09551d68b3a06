/* A layer's rows, moved and summed without the cost of a dozen small array operations.
 *
 * router/moe/permute.py is the face of these functions and says what each of them means; it does the same
 * with numpy and torch where this is not built.
 *
 * Letters: T tokens, K experts per token, P = T * K pairs, E experts, H values of a row.
 */
#include "rows.h"

#include "bfloat16.h"

#define BLOCK 256 /* values that are summed at once */
#define MAX_EXPERTS (1 << 20) /* of a token; and most bytes of a row: no product overflows */
#define MAX_ROW_BYTES (1 << 30)

void order_summands(const int64_t *ids, Py_ssize_t num_pairs, Py_ssize_t k, int64_t *summand_of) {
    for (Py_ssize_t begin = 0; begin < num_pairs; begin += k) {
        for (Py_ssize_t i = 0; i < k; i++) {
            Py_ssize_t summand = begin;
            for (Py_ssize_t j = 0; j < k; j++)
                summand += ids[begin + j] < ids[begin + i] ||
                           (ids[begin + j] == ids[begin + i] && j < i);
            summand_of[begin + i] = summand;
        }
    }
}

/* summands_of(ids [T, K] int64, k, summand_of [P] int64 out) */
FUNCTION(summands_of) {
    Buffers buffers = {.count = 0};
    Py_buffer *ids_view, *summands_view;
    if (!are_given(given, 3)) return NULL;
    Py_ssize_t k = PyLong_AsSsize_t(args[1]);
    if (k == -1 && PyErr_Occurred()) return NULL;
    if (!(ids_view = take(&buffers, args[0], 0))) return NULL;
    if (!(summands_view = take(&buffers, args[2], 1))) return NULL;
    Py_ssize_t num_pairs = ids_view->len / 8;
    if (k < 1 || num_pairs % k || summands_view->len != ids_view->len)
        return refuse(&buffers, "ids and summands must have K for each token");
    order_summands(ids_view->buf, num_pairs, k, summands_view->buf);
    release(&buffers);
    Py_RETURN_NONE;
}

/* A share's experts that are asked for, how many pairs each has, and where they begin and end. */
static PyObject *share_of(const int64_t *ordered_ids, const Py_ssize_t *next, Py_ssize_t k,
                          Py_ssize_t index, Py_ssize_t last) {
    Py_ssize_t count = 0, begin = next[index * k], end = next[last * k];
    for (Py_ssize_t i = index; i < last; i++) count += next[i * k] < next[(i + 1) * k];
    PyObject *ids = PyTuple_New(count), *counts = PyTuple_New(count), *share = NULL;
    for (Py_ssize_t i = 0; ids && counts && index < last; index++) {
        Py_ssize_t asked = next[(index + 1) * k] - next[index * k];
        if (!asked) continue;
        PyObject *id = PyLong_FromLongLong(ordered_ids[index]), *number = PyLong_FromSsize_t(asked);
        if (!id || !number) {
            Py_XDECREF(id);
            Py_XDECREF(number);
            Py_CLEAR(ids);
            break;
        }
        PyTuple_SET_ITEM(ids, i, id);
        PyTuple_SET_ITEM(counts, i++, number);
    }
    if (ids && counts) share = Py_BuildValue("OOnn", ids, counts, begin, end);
    Py_XDECREF(ids);
    Py_XDECREF(counts);
    return share;
}

const char *order_pairs(const Routing *r, Py_ssize_t *index_of, Py_ssize_t *next) {
    memset(next, 0, (r->num_experts * r->k + 1) * sizeof *next);
    for (Py_ssize_t i = 0; i < r->num_experts; i++) index_of[i] = -1;
    for (Py_ssize_t i = 0; i < r->num_experts; i++) {
        int64_t id = r->ordered_ids[i];
        if (id < 0 || id >= r->num_experts) return "an id beyond the experts";
        index_of[id] = i;
    }
    /* By the expert's index, then by rank; within both in the order of the pairs. */
    for (Py_ssize_t i = 0; i < r->num_pairs; i++) {
        int64_t pair = r->pairs ? r->pairs[i] : i;
        if (pair < 0 || pair >= r->num_ids || r->ids[pair] < 0 || r->ids[pair] >= r->num_experts ||
            index_of[r->ids[pair]] < 0)
            return "a pair beyond the ids, or an id beyond the experts";
        next[index_of[r->ids[pair]] * r->k + pair % r->k + 1]++;
    }
    for (Py_ssize_t i = 0; i < r->num_experts * r->k; i++) next[i + 1] += next[i];
    return NULL;
}

void place_pairs(const Routing *r, const Py_ssize_t *index_of, Py_ssize_t *next, int64_t *ordered) {
    for (Py_ssize_t i = 0; i < r->num_pairs; i++) {
        int64_t pair = r->pairs ? r->pairs[i] : i;
        ordered[next[index_of[r->ids[pair]] * r->k + pair % r->k]++] = pair;
    }
}

/* route(ids [P] int64, k, ordered_ids [E] int64, ends int64, pairs int64 or None, ordered int64 out)
 * -> (expert ids, counts, begin, end) for each share of the experts, which go up to `ends` */
FUNCTION(route) {
    Buffers buffers = {.count = 0};
    Py_buffer *ids_view, *experts_view, *ends_view, *pairs_view, *ordered_view;
    if (!are_given(given, 6)) return NULL;
    Py_ssize_t k = PyLong_AsSsize_t(args[1]);
    if (k == -1 && PyErr_Occurred()) return NULL;
    if (!(ids_view = take(&buffers, args[0], 0))) return NULL;
    if (!(experts_view = take(&buffers, args[2], 0))) return NULL;
    if (!(ends_view = take(&buffers, args[3], 0))) return NULL;
    if (!(pairs_view = take(&buffers, args[4] == Py_None ? args[0] : args[4], 0))) return NULL;
    if (!(ordered_view = take(&buffers, args[5], 1))) return NULL;
    Py_ssize_t num_ids = ids_view->len / 8, num_experts = experts_view->len / 8;
    Py_ssize_t num_pairs = pairs_view->len / 8, num_shares = ends_view->len / 8;
    if (k < 1 || k > MAX_EXPERTS || num_experts > MAX_EXPERTS ||
        ordered_view->len != pairs_view->len)
        return refuse(&buffers, "there must be as much room as pairs, and experts for each token");
    const int64_t *ids = ids_view->buf, *ordered_ids = experts_view->buf, *ends = ends_view->buf;
    const int64_t *pairs = args[4] == Py_None ? NULL : pairs_view->buf; /* all of them */
    int64_t *ordered = ordered_view->buf;
    for (Py_ssize_t i = 0; i < num_shares; i++)
        if (ends[i] < (i ? ends[i - 1] : 0) || ends[i] > num_experts)
            return refuse(&buffers, "a share beyond the experts");
    Routing routing = {ids, num_ids, pairs, num_pairs, k, ordered_ids, num_experts};
    Py_ssize_t *index_of = PyMem_Calloc(num_experts + num_experts * k + 1, sizeof *index_of);
    if (!index_of) {
        release(&buffers);
        return PyErr_NoMemory();
    }
    Py_ssize_t *next = index_of + num_experts;
    PyObject *shares = NULL;
    const char *wrong = order_pairs(&routing, index_of, next);
    if (wrong) {
        PyErr_SetString(PyExc_ValueError, wrong);
        goto done;
    }
    if (!(shares = PyList_New(num_shares))) goto done;
    for (Py_ssize_t i = 0; i < num_shares; i++) {
        PyObject *share = share_of(ordered_ids, next, k, i ? ends[i - 1] : 0, ends[i]);
        if (!share) {
            Py_CLEAR(shares);
            goto done;
        }
        PyList_SET_ITEM(shares, i, share);
    }
    place_pairs(&routing, index_of, next, ordered);
done:
    PyMem_Free(index_of);
    release(&buffers);
    return shares;
}

/* gather(rows, ordered int64, k, row_bytes) -> the bytes of row ordered[i] / k for each i */
FUNCTION(gather) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *ordered_view;
    if (!are_given(given, 4)) return NULL;
    Py_ssize_t k = PyLong_AsSsize_t(args[2]), row_bytes = PyLong_AsSsize_t(args[3]);
    if (PyErr_Occurred()) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(ordered_view = take(&buffers, args[1], 0))) return NULL;
    Py_ssize_t count = ordered_view->len / 8;
    const int64_t *ordered = ordered_view->buf;
    if (k < 1 || k > MAX_EXPERTS || row_bytes < 1 || row_bytes > MAX_ROW_BYTES ||
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

/* Rows lie where they were received. */
#ifdef __GNUC__
typedef uint16_t __attribute__((aligned(1), may_alias)) Bits;
typedef float __attribute__((aligned(1), may_alias)) Float;
#else
typedef uint16_t Bits;
typedef float Float;
#endif

#define EXPONENT 0x7f800000u /* of a float32; all ones in NaN and infinity */

/* Sum K weighted rows of bfloat16, each product and each sum rounded; whether all sums are finite. */
FOR_EACH_CPU
static int sum_bfloat16(uint16_t *sum, const char *const *rows, const float *weights,
                         Py_ssize_t k, Py_ssize_t size) {
    float sums[BLOCK];
    uint32_t largest = 0;
    for (Py_ssize_t begin = 0; begin < size; begin += BLOCK) {
        Py_ssize_t count = size - begin < BLOCK ? size - begin : BLOCK;
        const Bits *first = (const Bits *)rows[0] + begin;
        for (Py_ssize_t h = 0; h < count; h++) sums[h] = rounded(of_bfloat16(first[h]) * weights[0]);
        for (Py_ssize_t i = 1; i < k; i++) {
            const Bits *row = (const Bits *)rows[i] + begin;
            float weight = weights[i];
            for (Py_ssize_t h = 0; h < count; h++)
                sums[h] = rounded(sums[h] + rounded(of_bfloat16(row[h]) * weight));
        }
        for (Py_ssize_t h = 0; h < count; h++) {
            uint32_t bits;
            memcpy(&bits, &sums[h], 4);
            sum[begin + h] = (uint16_t)(bits >> 16);
            largest = (bits & EXPONENT) > largest ? bits & EXPONENT : largest;
        }
    }
    return largest != EXPONENT;
}

/* The same in float32. Contraction to one rounding is off (pyproject.toml), or the sum would have
 * other bits. */
FOR_EACH_CPU
static int sum_float32(float *sum, const char *const *rows, const float *weights, Py_ssize_t k,
                        Py_ssize_t size) {
    const Float *first = (const Float *)rows[0];
    for (Py_ssize_t h = 0; h < size; h++) sum[h] = first[h] * weights[0];
    for (Py_ssize_t i = 1; i < k; i++) {
        const Float *row = (const Float *)rows[i];
        float weight = weights[i];
        for (Py_ssize_t h = 0; h < size; h++) {
            float weighted = row[h] * weight;
            sum[h] = sum[h] + weighted;
        }
    }
    uint32_t largest = 0;
    for (Py_ssize_t h = 0; h < size; h++) {
        uint32_t bits;
        memcpy(&bits, &sum[h], 4);
        largest = (bits & EXPONENT) > largest ? bits & EXPONENT : largest;
    }
    return largest != EXPONENT;
}

int sum_rows(const char *const *row_of, const float *weight_of, Py_ssize_t num_pairs, Py_ssize_t k,
             char *sums, Py_ssize_t row_bytes, Py_ssize_t value_bytes) {
    Py_ssize_t size = row_bytes / value_bytes;
    int is_finite = 1;
    for (Py_ssize_t begin = 0; begin < num_pairs; begin += k) {
        char *sum = sums + begin / k * row_bytes;
        if (value_bytes == 4)
            is_finite &= sum_float32((float *)sum, row_of + begin, weight_of + begin, k, size);
        else
            is_finite &= sum_bfloat16((uint16_t *)sum, row_of + begin, weight_of + begin, k, size);
    }
    return is_finite;
}

void order_weights(const void *weights, Py_ssize_t weight_bytes, const int64_t *summand_of,
                   Py_ssize_t num_pairs, float *weight_of) {
    for (Py_ssize_t pair = 0; pair < num_pairs; pair++)
        weight_of[summand_of[pair]] = weight_bytes == 4
                                          ? ((const float *)weights)[pair]
                                          : of_bfloat16(((const uint16_t *)weights)[pair]);
}

/* What is summed: a row for each summand, and the buffers that they lie in. */
typedef struct {
    const char **row_of;
    char *zeros;
    Py_buffer *views;
    Py_ssize_t num_views;
} Received;

static void forget(Received *received) {
    while (received->num_views) PyBuffer_Release(&received->views[--received->num_views]);
    PyMem_Free(received->views);
    PyMem_Free(received->row_of);
    PyMem_Free(received->zeros);
}

/* Find the row of each summand in `pieces`, (pairs, their rows) each; 0 with an error set. */
static int find_rows(Received *received, PyObject *pieces, const int64_t *summand_of,
                     Py_ssize_t num_pairs, Py_ssize_t row_bytes) {
    Py_ssize_t count = PyList_Check(pieces) ? PyList_GET_SIZE(pieces) : -1, found = 0;
    if (count < 0) {
        PyErr_SetString(PyExc_TypeError, "pieces must be a list");
        return 0;
    }
    received->row_of = PyMem_Calloc(num_pairs, sizeof *received->row_of);
    received->views = PyMem_Calloc(2 * count + 1, sizeof *received->views);
    if (!received->row_of || !received->views) {
        PyErr_NoMemory();
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pairs_object, *rows_object;
        PyObject *piece = PyList_GET_ITEM(pieces, i);
        if (!PyTuple_Check(piece)) {
            PyErr_SetString(PyExc_TypeError, "a piece must be a tuple");
            return 0;
        }
        if (!PyArg_ParseTuple(piece, "OO", &pairs_object, &rows_object)) return 0;
        Py_buffer *pairs = &received->views[received->num_views];
        if (PyObject_GetBuffer(pairs_object, pairs, PyBUF_SIMPLE)) return 0;
        received->num_views++;
        Py_buffer *rows = &received->views[received->num_views];
        if (PyObject_GetBuffer(rows_object, rows, PyBUF_SIMPLE)) return 0;
        received->num_views++;
        Py_ssize_t size = pairs->len / 8;
        if (rows->len / row_bytes != size || rows->len % row_bytes) {
            PyErr_SetString(PyExc_ValueError, "there must be a row for each pair");
            return 0;
        }
        for (Py_ssize_t n = 0; n < size; n++) {
            int64_t pair = ((const int64_t *)pairs->buf)[n];
            if (pair < 0 || pair >= num_pairs) {
                PyErr_SetString(PyExc_ValueError, "a pair beyond the summands");
                return 0;
            }
            found += !received->row_of[summand_of[pair]];
            received->row_of[summand_of[pair]] = (const char *)rows->buf + n * row_bytes;
        }
    }
    if (found == num_pairs) return 1;
    if (!(received->zeros = PyMem_Calloc(row_bytes, 1))) {
        PyErr_NoMemory();
        return 0;
    }
    for (Py_ssize_t i = 0; i < num_pairs; i++)
        if (!received->row_of[i]) received->row_of[i] = received->zeros;
    return 1;
}

/* combine(pieces, weights [P], summand_of [P] int64, k, sums [T, H] out, value_bytes) -> whether all
 * sums are finite: pieces are (pairs int64, their rows) each, and pairs without a row have zeros. Values
 * of two bytes are bfloat16, those of four float32, and so are weights, whatever rows are. */
FUNCTION(combine) {
    Buffers buffers = {.count = 0};
    Received received = {0};
    Py_buffer *weights, *summands_view, *sums;
    if (!are_given(given, 6)) return NULL;
    Py_ssize_t k = PyLong_AsSsize_t(args[3]), value_bytes = PyLong_AsSsize_t(args[5]);
    if (PyErr_Occurred()) return NULL;
    if (!(weights = take(&buffers, args[1], 0))) return NULL;
    if (!(summands_view = take(&buffers, args[2], 0))) return NULL;
    if (!(sums = take(&buffers, args[4], 1))) return NULL;
    Py_ssize_t num_pairs = summands_view->len / 8;
    if (k < 1 || num_pairs < 1 || num_pairs % k || (value_bytes != 2 && value_bytes != 4))
        return refuse(&buffers, "there must be K summands a token, and values of 2 or 4 bytes");
    Py_ssize_t weight_bytes = weights->len / num_pairs, row_bytes = sums->len / (num_pairs / k);
    if (weights->len % num_pairs || (weight_bytes != 2 && weight_bytes != 4) || row_bytes < 1 ||
        sums->len % (num_pairs / k) || row_bytes % value_bytes)
        return refuse(&buffers, "there must be a weight for each pair, and a sum for each token");
    const int64_t *summand_of = summands_view->buf;
    for (Py_ssize_t begin = 0; begin < num_pairs; begin += k)
        for (Py_ssize_t i = begin; i < begin + k; i++)
            if (summand_of[i] < begin || summand_of[i] >= begin + k)
                return refuse(&buffers, "a summand that is another token's");
    float *weight_of = PyMem_Calloc(num_pairs, sizeof *weight_of); /* of each summand */
    if (!weight_of) {
        release(&buffers);
        return PyErr_NoMemory();
    }
    order_weights(weights->buf, weight_bytes, summand_of, num_pairs, weight_of);
    int is_found = find_rows(&received, args[0], summand_of, num_pairs, row_bytes);
    PyThreadState *saved = is_found && sums->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    int is_finite = is_found && sum_rows(received.row_of, weight_of, num_pairs, k, sums->buf,
                                         row_bytes, value_bytes);
    if (saved) PyEval_RestoreThread(saved);
    PyMem_Free(weight_of);
    forget(&received);
    release(&buffers);
    if (!is_found) return NULL;
    return PyBool_FromLong(is_finite);
}

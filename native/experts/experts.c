/* Gated feed-forward experts on any processor: gate, up, activation and down of several experts.
 *
 * experts/compute/native_ffn.py is the face of these functions and packs the weights. A row's
 * result depends on the row, the weights and the kernel's class alone; products.h and tiles.c have
 * the order of sums.
 *
 * An expert is one buffer of panels as kernels.h has them: each of SIDE outputs of gate and the
 * same of up, then those of down, and of an expert with biases the biases of all these outputs in
 * float32. Outputs beyond the last are zero.
 *
 * Letters: P rows, H hidden size, I intermediate size, K length of a sum.
 */
#include "kernels.h"
#include "pool.h"

#define MIN_SLICE_ROWS 24
#define SLICE_VALUES (1 << 18)   /* of a slice's rows and inner rows, in float32 */
#define BATCH_VALUES (1 << 20)   /* the same of the slices that several threads share */
#define SHARE_PRODUCTS (1 << 23) /* so many are worth another thread, which has to wake up */
#define THREAD_SHARES 4          /* so that a thread that is late leaves its shares to others */
#define READ_ROWS 4 /* reading a weight takes as long as so many products with it */

/* Some rows of one expert, and room for them. */
typedef struct {
    const char *gate_up, *down, *rows;
    const float *gate_up_bias, *down_bias; /* or NULL */
    char *out;
    Py_ssize_t num_rows;
    float *tiled, *inner;
} Slice;

/* One of the two products of some slices, in shares of their panels. */
typedef struct {
    const Shape *shape;
    const Kernel *kernel;
    const Slice *slices;
    Py_ssize_t num_panels, num_shares; /* panels of all slices */
    int is_last;
} Product;

static Py_ssize_t panels_of(const Shape *s, int is_last) {
    return is_last ? (s->hidden + PANEL - 1) / PANEL : (s->inner + SIDE - 1) / SIDE;
}

static Py_ssize_t panel_bytes(const Shape *s, int is_last) {
    return (is_last ? s->inner_length : s->hidden_length) * PANEL * (s->weights == FLOAT32 ? 4 : 2);
}

static void compute_share(void *context, Py_ssize_t number) {
    const Product *p = context;
    const Shape *s = p->shape;
    const Kernel *kernel = p->kernel;
    Py_ssize_t num_panels = panels_of(s, p->is_last), bytes = panel_bytes(s, p->is_last);
    Py_ssize_t at = p->num_panels * number / p->num_shares;
    Py_ssize_t end = p->num_panels * (number + 1) / p->num_shares;
    float sums[SLICE_ROWS * PANEL] __attribute__((aligned(64)));
    for (; at < end; at++) {
        const Slice *slice = &p->slices[at / num_panels];
        Py_ssize_t panel = at % num_panels, count = slice->num_rows;
        if (p->is_last) {
            kernel->multiply(slice->down + panel * bytes, slice->inner, count, s->inner_length,
                             s->weights, sums);
            kernel->round_sums(sums, s, slice->down_bias, panel, count, slice->out);
        } else {
            kernel->multiply(slice->gate_up + panel * bytes, slice->tiled, count,
                             s->hidden_length, s->weights, sums);
            kernel->gate_sums(sums, s, slice->gate_up_bias, panel, count, slice->inner);
        }
    }
}

/* Compute one of the two products, on several threads where that pays. */
static void compute_product(Product *p, Py_ssize_t num_slices, Py_ssize_t threads) {
    Py_ssize_t num_panels = panels_of(p->shape, p->is_last), num_rows = 0;
    Py_ssize_t weights = num_panels * PANEL;
    weights *= p->is_last ? p->shape->inner_length : p->shape->hidden_length;
    for (Py_ssize_t i = 0; i < num_slices; i++) num_rows += p->slices[i].num_rows + READ_ROWS;
    Py_ssize_t worthwhile = weights / (SHARE_PRODUCTS / num_rows + 1);
    if (threads > worthwhile) threads = worthwhile;
    p->num_panels = num_panels * num_slices;
    p->num_shares = threads > 1 ? threads * THREAD_SHARES : 1;
    if (p->num_shares > p->num_panels) p->num_shares = p->num_panels;
    pool_run(compute_share, p, p->num_shares, threads);
}

static Py_ssize_t slice_rows(const Shape *s) {
    Py_ssize_t most = SLICE_VALUES / (s->hidden_length + s->inner_length);
    if (most > SLICE_ROWS) most = SLICE_ROWS;
    return most < MIN_SLICE_ROWS ? MIN_SLICE_ROWS : most;
}

/* Compute experts whose `num_rows` may be many; 0 when there is no memory. */
static int compute_experts(const Shape *s, const Kernel *kernel, const Slice *experts,
                           Py_ssize_t num_experts, Py_ssize_t threads) {
    Py_ssize_t values = s->hidden_length + s->inner_length, most = slice_rows(s), num_slices = 0;
    Py_ssize_t room_rows = 0, row_bytes = s->hidden * (s->rows == FLOAT32 ? 4 : 2);
    for (Py_ssize_t i = 0; i < num_experts; i++) {
        num_slices += (experts[i].num_rows + most - 1) / most;
        room_rows += experts[i].num_rows;
    }
    /* Several threads share the slices of a batch; one thread computes slice by slice. */
    Py_ssize_t batch_rows = threads > 1 ? BATCH_VALUES / values : 0;
    if (batch_rows < most) batch_rows = most;
    if (room_rows > batch_rows) room_rows = batch_rows;
    Slice *slices = PyMem_RawCalloc(num_slices + 1, sizeof *slices);
    char *room = PyMem_RawMalloc(room_rows * values * sizeof(float) + 64);
    int has_memory = slices && room;
    for (Py_ssize_t i = 0, n = 0; has_memory && i < num_experts; i++) {
        Py_ssize_t count = experts[i].num_rows, parts = (count + most - 1) / most;
        for (Py_ssize_t part = 0; part < parts; part++, n++) {
            Py_ssize_t begin = count * part / parts;
            slices[n] = experts[i];
            slices[n].rows += begin * row_bytes;
            slices[n].out += begin * row_bytes;
            slices[n].num_rows = count * (part + 1) / parts - begin;
        }
    }
    for (Py_ssize_t done = 0; has_memory && done < num_slices;) {
        float *free_room = (float *)(((uintptr_t)room + 63) / 64 * 64);
        Py_ssize_t end = done, rows = 0;
        while (end < num_slices && rows + slices[end].num_rows <= room_rows &&
               (threads > 1 || end == done)) {
            Slice *slice = &slices[end++];
            rows += slice->num_rows;
            slice->tiled = free_room;
            slice->inner = free_room + slice->num_rows * s->hidden_length;
            free_room += slice->num_rows * values;
            kernel->tile_rows(slice->rows, slice->num_rows, s->hidden, s->hidden_length, s->rows,
                              s->weights == PAIRS, slice->tiled);
        }
        Product product = {.shape = s, .kernel = kernel, .slices = slices + done};
        compute_product(&product, end - done, threads);
        product.is_last = 1;
        compute_product(&product, end - done, threads);
        done = end;
    }
    PyMem_RawFree(room);
    PyMem_RawFree(slices);
    return has_memory;
}

/* Take the weights of each expert; 0 with an error set. */
static int take_experts(PyObject *given, const Shape *s, Slice *experts, Py_buffer *views,
                        Py_ssize_t *num_views) {
    Py_ssize_t gate_up = panels_of(s, 0) * panel_bytes(s, 0);
    Py_ssize_t down = panels_of(s, 1) * panel_bytes(s, 1), length = gate_up + down;
    int has_biases = s->activation == CLAMPED;
    if (has_biases) length += (panels_of(s, 0) + panels_of(s, 1)) * PANEL * 4;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); i++) {
        Py_buffer *view = &views[i];
        if (PyObject_GetBuffer(PyTuple_GET_ITEM(given, i), view, PyBUF_SIMPLE)) return 0;
        ++*num_views;
        if (view->len != length) {
            PyErr_SetString(PyExc_ValueError, "there must be weights as the sizes say");
            return 0;
        }
        experts[i].gate_up = view->buf;
        experts[i].down = experts[i].gate_up + gate_up;
        if (!has_biases) continue;
        experts[i].gate_up_bias = (const float *)(experts[i].down + down);
        experts[i].down_bias = experts[i].gate_up_bias + panels_of(s, 0) * PANEL;
    }
    return 1;
}

/* Give each expert as many of the rows as it is to have; 0 with an error set. */
static int share_rows(PyObject *counts, const Shape *s, Slice *experts, const Py_buffer *rows,
                      const Py_buffer *out) {
    Py_ssize_t row_bytes = s->hidden * (s->rows == FLOAT32 ? 4 : 2);
    Py_ssize_t done = 0, total = rows->len / row_bytes;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(counts); i++) {
        Py_ssize_t count = PyLong_AsSsize_t(PyTuple_GET_ITEM(counts, i));
        if (count == -1 && PyErr_Occurred()) return 0;
        if (count < 0 || count > total - done) {
            PyErr_SetString(PyExc_ValueError, "there must be rows for each expert");
            return 0;
        }
        experts[i].num_rows = count;
        experts[i].rows = (const char *)rows->buf + done * row_bytes;
        experts[i].out = (char *)out->buf + done * row_bytes;
        done += count;
    }
    if (done == total && rows->len == total * row_bytes && out->len == rows->len) return 1;
    PyErr_SetString(PyExc_ValueError, "there must be as many rows as experts are to have");
    return 0;
}

/* ffn(rows [P, H], counts, experts, out [P, H], (H, I, format of the weights, of the rows,
 * activation), most threads, kernel or None): the first counts[0] rows by the first expert, and so
 * on. Formats and activations are numbers as above. */
FUNCTION(ffn) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *out;
    Shape s;
    int weights, row_format, activation;
    if (!are_given(given, 7)) return NULL;
    if (!PyTuple_CheckExact(args[1]) || !PyTuple_CheckExact(args[2]) ||
        !PyTuple_CheckExact(args[4])) {
        PyErr_SetString(PyExc_TypeError, "counts, experts and sizes must be tuples");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[4], "nniii", &s.hidden, &s.inner, &weights, &row_format,
                          &activation))
        return NULL;
    Py_ssize_t threads = PyLong_AsSsize_t(args[5]);
    if (PyErr_Occurred()) return NULL;
    const Kernel *kernel = kernel_named(args[6]);
    if (!kernel) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(out = take(&buffers, args[3], 1))) return NULL;
    if (s.hidden < 1 || s.hidden > MAX_SIZE || s.inner < 1 || s.inner > MAX_SIZE || threads < 1 ||
        weights < FLOAT32 || weights > FLOAT16 || row_format < FLOAT32 || row_format > FLOAT16 ||
        activation < SILU || activation > CLAMPED)
        return refuse(&buffers, "sizes must be positive, and formats and activations known");
    s.weights = (Format)weights;
    s.rows = (Format)row_format;
    s.activation = (Activation)activation;
    if (kernel->has_pairs && s.weights == BFLOAT16 && s.rows == BFLOAT16) s.weights = PAIRS;
    s.hidden_length = s.hidden + (weights == BFLOAT16 ? s.hidden % 2 : 0);
    s.inner_length = s.inner + (weights == BFLOAT16 ? s.inner % 2 : 0);
    Py_ssize_t count = PyTuple_GET_SIZE(args[1]), num_views = 0;
    if (PyTuple_GET_SIZE(args[2]) != count)
        return refuse(&buffers, "there must be a count for each expert");
    Slice *experts = PyMem_RawCalloc(count + 1, sizeof *experts);
    Py_buffer *views = PyMem_RawCalloc(count + 1, sizeof *views);
    PyObject *result = NULL;
    if (!experts || !views) {
        PyErr_NoMemory();
    } else if (take_experts(args[2], &s, experts, views, &num_views) &&
               share_rows(args[1], &s, experts, rows, out)) {
        PyThreadState *saved = PyEval_SaveThread();
        int has_memory = compute_experts(&s, kernel, experts, count, threads);
        PyEval_RestoreThread(saved);
        result = has_memory ? Py_NewRef(Py_None) : PyErr_NoMemory();
    }
    while (num_views) PyBuffer_Release(&views[--num_views]);
    PyMem_RawFree(views);
    PyMem_RawFree(experts);
    release(&buffers);
    return result;
}

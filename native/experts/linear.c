/* Linear layers on any processor: rows times packed weights.
 *
 * router/model/cpu/native_modules.py is the face of this function; experts/compute/panels.py packs
 * the weights. A row's result depends on the row, the weights and the kernel's class alone;
 * products.h has the order of sums.
 *
 * Letters: P rows, K length of a sum, O outputs.
 */
#include "linear.h"

#include "bfloat16.h"
#include "float16.h"
#include "pool.h"

#define SLICE_VALUES (1 << 17) /* of the rows that use a panel while they are in the cache */
#define MIN_SLICE_ROWS 24
#define SHARE_PRODUCTS (1 << 22) /* so many are worth a thread of the pool, which has to wake up */
#define THREAD_SHARES 4          /* so that a thread that is late leaves its shares to others */
#define READ_ROWS 4 /* reading a weight takes as long as so many products with it */

static Py_ssize_t panels_of(const Matrix *m) { return (m->outputs + PANEL - 1) / PANEL; }

static Py_ssize_t length_of(const Matrix *m) {
    return m->size + (m->format == BFLOAT16 ? m->size % 2 : 0);
}

int is_format(int number) { return number >= FLOAT32 && number <= FLOAT16; }

int take_matrix(const Py_buffer *from, Py_ssize_t size, Py_ssize_t outputs, int format,
                int has_bias, Matrix *matrix) {
    if (size < 1 || size > MAX_SIZE || outputs < 1 || outputs > MAX_SIZE || !is_format(format)) {
        PyErr_SetString(PyExc_ValueError, "sizes must be positive, and formats known");
        return 0;
    }
    *matrix = (Matrix){.panels = from->buf, .size = size, .outputs = outputs, .format = (Format)format};
    Py_ssize_t values = panels_of(matrix) * PANEL, length = length_of(matrix);
    Py_ssize_t panel_bytes = values * length * bytes_of(matrix->format);
    if (from->len != panel_bytes + (has_bias ? values * 4 : 0)) {
        PyErr_SetString(PyExc_ValueError, "there must be weights as the sizes say");
        return 0;
    }
    if (has_bias) matrix->bias = (const float *)(matrix->panels + panel_bytes);
    return 1;
}

/* Some of the rows, tiled for the kernel, and where their sums go. */
typedef struct {
    const Kernel *kernel;
    const Matrix *matrix;
    Format format;     /* of the products */
    Shape rounding;    /* as round_sums takes it */
    const float *tiled;
    Py_ssize_t num_rows, num_shares;
    Rows added;
    char *out;
} Slice;

static float value_of(Rows rows, Py_ssize_t i) {
    uint16_t bits;
    float value;
    if (rows.format == FLOAT32) {
        memcpy(&value, rows.values + i * 4, 4);
        return value;
    }
    memcpy(&bits, rows.values + i * 2, 2);
    return rows.format == BFLOAT16 ? of_bfloat16(bits) : of_float16(bits);
}

static void add_rows(const Slice *slice, Py_ssize_t number, float *sums) {
    Py_ssize_t outputs = slice->matrix->outputs, first = number * PANEL;
    Py_ssize_t width = outputs - first < PANEL ? outputs - first : PANEL;
    for (Py_ssize_t r = 0; r < slice->num_rows; r++, sums += PANEL)
        for (Py_ssize_t i = 0; i < width; i++)
            sums[i] += value_of(slice->added, r * outputs + first + i);
}

/* A share of the panels. */
static void multiply_share(void *given, Py_ssize_t index) {
    const Slice *slice = given;
    const Matrix *m = slice->matrix;
    Py_ssize_t num_panels = panels_of(m), length = length_of(m);
    Py_ssize_t bytes = length * PANEL * bytes_of(m->format);
    Py_ssize_t end = num_panels * (index + 1) / slice->num_shares;
    float sums[SLICE_ROWS * PANEL] __attribute__((aligned(64)));
    for (Py_ssize_t n = num_panels * index / slice->num_shares; n < end; n++) {
        slice->kernel->multiply(m->panels + n * bytes, slice->tiled, slice->num_rows, length,
                                slice->format, sums);
        if (slice->added.values) add_rows(slice, n, sums);
        slice->kernel->round_sums(sums, &slice->rounding, m->bias, n, slice->num_rows, slice->out);
    }
}

int multiply_rows(const Kernel *kernel, const Matrix *m, Rows rows, Py_ssize_t num_rows,
                  Rows added, char *out, Format out_format, Py_ssize_t threads) {
    Py_ssize_t length = length_of(m), most = SLICE_VALUES / length;
    if (most > SLICE_ROWS) most = SLICE_ROWS;
    if (most < MIN_SLICE_ROWS) most = MIN_SLICE_ROWS;
    Py_ssize_t parts = (num_rows + most - 1) / most, num_panels = panels_of(m);
    if (most > num_rows) most = num_rows;
    char *room = PyMem_RawMalloc(most * length * sizeof(float) + 64);
    if (!room) return 0;
    float *tiled = (float *)(((uintptr_t)room + 63) / 64 * 64);
    int in_pairs = kernel->has_pairs && m->format == BFLOAT16 && rows.format == BFLOAT16;
    Slice slice = {.kernel = kernel, .matrix = m, .format = in_pairs ? PAIRS : m->format,
                   .rounding = {.hidden = m->outputs, .rows = out_format}, .tiled = tiled};
    for (Py_ssize_t part = 0; part < parts; part++) {
        Py_ssize_t begin = num_rows * part / parts, end = num_rows * (part + 1) / parts;
        slice.num_rows = end - begin;
        slice.out = out + begin * m->outputs * bytes_of(out_format);
        slice.added = added;
        if (added.values) slice.added.values += begin * m->outputs * bytes_of(added.format);
        kernel->tile_rows(rows.values + begin * m->size * bytes_of(rows.format), slice.num_rows,
                          m->size, length, rows.format, in_pairs, tiled);
        Py_ssize_t work = num_panels * PANEL * length / (SHARE_PRODUCTS / (slice.num_rows + READ_ROWS));
        Py_ssize_t worthwhile = work < threads ? work : threads;
        slice.num_shares = worthwhile > 1 ? worthwhile * THREAD_SHARES : 1;
        if (slice.num_shares > num_panels) slice.num_shares = num_panels;
        pool_run(multiply_share, &slice, slice.num_shares, worthwhile);
    }
    PyMem_RawFree(room);
    return 1;
}

/* linear(rows [M, P, K], packed, out [M, P, O], (M, K, O, formats of the weights, of the rows and of
 * out, whether there is a bias), most threads, kernel or None): M matrices, each with rows of its
 * own; `packed` has one after the other */
FUNCTION(linear) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *packed, *out;
    Py_ssize_t count, size, outputs;
    int format, row_format, out_format, has_bias;
    if (!are_given(given, 6)) return NULL;
    if (!PyTuple_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "sizes must be a tuple");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[3], "nnniiii", &count, &size, &outputs, &format, &row_format,
                          &out_format, &has_bias))
        return NULL;
    Py_ssize_t threads = PyLong_AsSsize_t(args[4]);
    if (PyErr_Occurred()) return NULL;
    const Kernel *kernel = kernel_named(args[5]);
    if (!kernel) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(packed = take(&buffers, args[1], 0))) return NULL;
    if (!(out = take(&buffers, args[2], 1))) return NULL;
    if (!is_format(row_format) || !is_format(out_format) || threads < 1 || count < 1 ||
        count > MAX_SIZE || packed->len % count)
        return refuse(&buffers, "formats must be known, and matrices and threads positive");
    Py_ssize_t packed_bytes = packed->len / count;
    Py_buffer first = *packed;
    first.len = packed_bytes;
    Matrix matrix;
    if (!take_matrix(&first, size, outputs, format, has_bias, &matrix)) {
        release(&buffers);
        return NULL;
    }
    Py_ssize_t row_bytes = size * bytes_of((Format)row_format);
    Py_ssize_t out_bytes = outputs * bytes_of((Format)out_format), total = rows->len / row_bytes;
    if (rows->len != total * row_bytes || out->len / out_bytes != total || out->len % out_bytes ||
        total % count)
        return refuse(&buffers, "there must be whole rows, and as many of them in out");
    Py_ssize_t num_rows = total / count;
    Rows from = {rows->buf, (Format)row_format}, none = {NULL, FLOAT32};
    char *to = out->buf;
    int has_memory = 1;
    PyThreadState *saved = PyEval_SaveThread();
    for (Py_ssize_t i = 0; has_memory && i < count; i++) {
        has_memory = multiply_rows(kernel, &matrix, from, num_rows, none, to, (Format)out_format,
                                   threads);
        matrix.panels += packed_bytes;
        if (matrix.bias) matrix.bias = (const float *)((const char *)matrix.bias + packed_bytes);
        from.values += num_rows * row_bytes;
        to += num_rows * out_bytes;
    }
    PyEval_RestoreThread(saved);
    release(&buffers);
    return has_memory ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

/* An expert's products of a few rows by AMX tiles, with weights read once, as they lie.
 *
 * experts/compute/amx_ffn.py is the face of these functions. The sums have the bits of oneDNN's, since both
 * have a tile add up the products of one value after the other.
 *
 * Letters: P rows, H hidden size, I intermediate size.
 */
#include "native.h"

#include "bfloat16.h"

#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* No processor has tiles without AVX-512. */
#define WITH_TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl")))
#define SIDE 16                /* rows of a tile, and float32 in one */
#define PAIRED 32              /* bfloat16 in a row of a tile: two to a sum */
#define MOST_ROWS (2 * SIDE)   /* columns of two tiles */
#define MOST_SIZE (1 << 24)    /* no product of sizes overflows */
#define TILE_DATA 18           /* what the kernel is asked to let this process use (arch_prctl) */
#define REQUEST_PERMISSION 0x1023

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t num_rows[16];
} Tiles;

/* Sums are tiles 0 to 3, weights 4 and 5, rows 6 and 7. */
WITH_TILES static void shape_tiles(int first, int second) {
    Tiles tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        int columns = i % 2 ? second : first;
        tiles.num_rows[i] = SIDE;
        tiles.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? 2 * PAIRED : 4 * columns);
    }
    if (!second) tiles.num_rows[1] = tiles.num_rows[3] = tiles.num_rows[7] = 0;
    _tile_loadconfig(&tiles);
}

/* Rows with two values of each side by side, as a tile takes them on the right: the values 2i and
 * 2i + 1 of row p are at [i][p]. */
static void pair_up(const uint16_t *rows, Py_ssize_t num_rows, Py_ssize_t size, uint32_t *paired) {
    for (Py_ssize_t p = 0; p < num_rows; p++)
        for (Py_ssize_t i = 0; i < size / 2; i++)
            memcpy(&paired[i * num_rows + p], rows + p * size + 2 * i, 4);
}

/* Sums [2][SIDE][P] of SIDE rows of weights at `above`, and of as many at `below`. */
WITH_TILES static void multiply(const uint16_t *above, const uint16_t *below, Py_ssize_t size,
                                const uint32_t *paired, int num_rows, float *sums) {
    int is_wide = num_rows > SIDE;
    size_t stride = (size_t)size * 2, row_bytes = (size_t)num_rows * 4;
    _tile_zero(0);
    _tile_zero(2);
    if (is_wide) {
        _tile_zero(1);
        _tile_zero(3);
    }
    for (Py_ssize_t k = 0; k < size; k += PAIRED) {
        const uint32_t *right = paired + k / 2 * num_rows;
        _tile_loadd(4, above + k, stride);
        _tile_loadd(5, below + k, stride);
        _tile_loadd(6, right, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (is_wide) {
            _tile_loadd(7, right + SIDE, row_bytes);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, row_bytes);
    _tile_stored(2, sums + SIDE * num_rows, row_bytes);
    if (is_wide) {
        _tile_stored(1, sums + SIDE, row_bytes);
        _tile_stored(3, sums + SIDE * num_rows + SIDE, row_bytes);
    }
}

typedef struct {
    const uint16_t *rows, *gate_up, *down, *activation;
    uint16_t *out;
    Py_ssize_t num_rows, hidden, inner;
} Expert;

/* `room` takes the rows in pairs, then what is between the two products. */
WITH_TILES static void compute(const Expert *e, uint32_t *room) {
    float sums[2 * SIDE * MOST_ROWS];
    uint16_t values[SIDE * MOST_ROWS];
    int num_rows = (int)e->num_rows;
    uint16_t *inner = (uint16_t *)(room + num_rows * e->hidden / 2);
    pair_up(e->rows, num_rows, e->hidden, room);
    shape_tiles(num_rows < SIDE ? num_rows : SIDE, num_rows > SIDE ? num_rows - SIDE : 0);
    for (Py_ssize_t m = 0; m < e->inner; m += SIDE) {
        const uint16_t *gate = e->gate_up + m * e->hidden, *up = gate + e->inner * e->hidden;
        multiply(gate, up, e->hidden, room, num_rows, sums);
        int count = SIDE * num_rows;
        const float *ups = sums + count;
        for (int i = 0; i < count; i++) values[i] = to_bfloat16(sums[i]);
        for (int i = 0; i < count; i++) values[i] = e->activation[values[i]];
        for (int i = 0; i < count; i++)
            values[i] = to_bfloat16(of_bfloat16(values[i]) * rounded(ups[i]));
        for (int i = 0; i < SIDE; i += 2) {
            uint16_t *to = inner + (m + i) * num_rows;
            for (int p = 0; p < num_rows; p++) {
                to[2 * p] = values[i * num_rows + p];
                to[2 * p + 1] = values[(i + 1) * num_rows + p];
            }
        }
    }
    for (Py_ssize_t m = 0; m < e->hidden; m += 2 * SIDE) {
        const uint16_t *down = e->down + m * e->inner;
        multiply(down, down + SIDE * e->inner, e->inner, (uint32_t *)inner, num_rows, sums);
        for (int p = 0; p < num_rows; p++)
            for (int i = 0; i < 2 * SIDE; i++)
                e->out[p * e->hidden + m + i] = to_bfloat16(sums[i * num_rows + p]);
    }
    _tile_release();
}

static int is_permitted;

/* may_tile() -> whether there are tiles and the kernel lets this process use them */
FUNCTION(may_tile) {
    if (!are_given(given, 0)) return NULL;
    is_permitted = !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
    return PyBool_FromLong(is_permitted);
}

/* Take the weights of each of `pairs`, (gate_up, down) each; 0 with an error set. */
static int take_weights(PyObject *pairs, Expert *experts, Py_buffer *views, Py_ssize_t *num_views,
                        Py_ssize_t hidden, Py_ssize_t inner) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(pairs); i++) {
        PyObject *pair = PyTuple_GET_ITEM(pairs, i);
        if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2) {
            PyErr_SetString(PyExc_TypeError, "an expert's weights must be two");
            return 0;
        }
        for (int part = 0; part < 2; part++) {
            Py_buffer *view = &views[*num_views];
            if (PyObject_GetBuffer(PyTuple_GET_ITEM(pair, part), view, PyBUF_SIMPLE)) return 0;
            ++*num_views;
            if (view->len != (part ? 2 : 4) * inner * hidden) {
                PyErr_SetString(PyExc_ValueError, "there must be weights as the sizes say");
                return 0;
            }
        }
        experts[i].gate_up = views[*num_views - 2].buf;
        experts[i].down = views[*num_views - 1].buf;
    }
    return 1;
}

/* Give each expert as many of the rows as it is to have; 0 with an error set. */
static int share_rows(PyObject *counts, Expert *experts, const Py_buffer *rows, Py_buffer *out,
                      Py_ssize_t hidden) {
    Py_ssize_t done = 0, total = rows->len / 2 / hidden;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(counts); i++) {
        Py_ssize_t count = PyLong_AsSsize_t(PyTuple_GET_ITEM(counts, i));
        if (count == -1 && PyErr_Occurred()) return 0;
        if (count < 1 || count > MOST_ROWS || count > total - done) {
            PyErr_SetString(PyExc_ValueError, "there must be 1 to 32 rows for each expert");
            return 0;
        }
        experts[i].num_rows = count;
        experts[i].rows = (const uint16_t *)rows->buf + done * hidden;
        experts[i].out = (uint16_t *)out->buf + done * hidden;
        done += count;
    }
    if (done == total && rows->len == total * hidden * 2 && out->len == rows->len) return 1;
    PyErr_SetString(PyExc_ValueError, "there must be as many rows as experts are to have");
    return 0;
}

/* tiled_ffns(rows [P, H] bfloat16, counts, weights, activation [65536] of each bfloat16 by its
 * bits, out [P, H], H, I), once may_tile(): the first counts[0] rows, 32 at most, by the first
 * expert, whose weights are (gate_up [2 * I, H] bfloat16, down [H, I] the same), and so on */
FUNCTION(tiled_ffns) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *activation, *out;
    if (!are_given(given, 7)) return NULL;
    Py_ssize_t hidden = PyLong_AsSsize_t(args[5]), inner = PyLong_AsSsize_t(args[6]);
    if (PyErr_Occurred()) return NULL;
    if (!PyTuple_CheckExact(args[1]) || !PyTuple_CheckExact(args[2])) {
        PyErr_SetString(PyExc_TypeError, "counts and weights must be tuples");
        return NULL;
    }
    if (!is_permitted) return refuse(&buffers, "may_tile() has not said so");
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(activation = take(&buffers, args[3], 0))) return NULL;
    if (!(out = take(&buffers, args[4], 1))) return NULL;
    if (hidden < 1 || hidden > MOST_SIZE || hidden % PAIRED || inner < 1 || inner > MOST_SIZE ||
        inner % PAIRED)
        return refuse(&buffers, "sizes must be multiples of 32");
    Py_ssize_t count = PyTuple_GET_SIZE(args[1]), num_views = 0;
    if (PyTuple_GET_SIZE(args[2]) != count || activation->len != 2 * 65536)
        return refuse(&buffers, "there must be a count for each expert, and an activation");
    Expert *experts = PyMem_RawCalloc(count + 1, sizeof *experts);
    Py_buffer *views = PyMem_RawCalloc(2 * count + 1, sizeof *views);
    uint32_t *room = PyMem_RawMalloc(MOST_ROWS * (hidden + inner) * 2);
    PyObject *result = NULL;
    if (!experts || !views || !room) {
        PyErr_NoMemory();
    } else if (take_weights(args[2], experts, views, &num_views, hidden, inner) &&
               share_rows(args[1], experts, rows, out, hidden)) {
        PyThreadState *saved = PyEval_SaveThread();
        for (Py_ssize_t i = 0; i < count; i++) {
            experts[i].activation = activation->buf;
            experts[i].hidden = hidden;
            experts[i].inner = inner;
            compute(&experts[i], room);
        }
        PyEval_RestoreThread(saved);
        result = Py_NewRef(Py_None);
    }
    while (num_views) PyBuffer_Release(&views[--num_views]);
    PyMem_RawFree(room);
    PyMem_RawFree(views);
    PyMem_RawFree(experts);
    release(&buffers);
    return result;
}
#else
FUNCTION(may_tile) { return are_given(given, 0) ? Py_NewRef(Py_False) : NULL; }

FUNCTION(tiled_ffns) {
    PyErr_SetString(PyExc_ValueError, "built for a processor without tiles");
    return NULL;
}
#endif

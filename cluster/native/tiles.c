/* An expert's products of a few rows by AMX tiles, with weights read once, as they lie.
 *
 * experts/tiled.py is the face of these functions. The sums have the bits of oneDNN's, since both
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

/* may_tile() -> whether the kernel lets this process use tiles; the caller knows that there are */
FUNCTION(may_tile) {
    if (!are_given(given, 0)) return NULL;
    return PyBool_FromLong(!syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA));
}

/* tiled_ffn(rows [P, H] bfloat16, gate_up [2 * I, H] the same, down [H, I] the same, activation
 * [65536] of each bfloat16 by its bits, out [P, H], H, I), for up to 32 rows, where may_tile() */
FUNCTION(tiled_ffn) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *gate_up, *down, *activation, *out;
    if (!are_given(given, 7)) return NULL;
    Py_ssize_t hidden = PyLong_AsSsize_t(args[5]), inner = PyLong_AsSsize_t(args[6]);
    if (PyErr_Occurred()) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(gate_up = take(&buffers, args[1], 0))) return NULL;
    if (!(down = take(&buffers, args[2], 0))) return NULL;
    if (!(activation = take(&buffers, args[3], 0))) return NULL;
    if (!(out = take(&buffers, args[4], 1))) return NULL;
    if (hidden < 1 || hidden > MOST_SIZE || hidden % PAIRED || inner < 1 || inner > MOST_SIZE ||
        inner % PAIRED)
        return refuse(&buffers, "sizes must be multiples of 32");
    Py_ssize_t num_rows = rows->len / 2 / hidden;
    if (num_rows < 1 || num_rows > MOST_ROWS || rows->len != num_rows * hidden * 2 ||
        out->len != rows->len || gate_up->len != 4 * inner * hidden ||
        down->len != 2 * inner * hidden || activation->len != 2 * 65536)
        return refuse(&buffers, "there must be 1 to 32 rows, and weights as the sizes say");
    Expert expert = {.rows = rows->buf, .gate_up = gate_up->buf, .down = down->buf,
                     .activation = activation->buf, .out = out->buf, .num_rows = num_rows,
                     .hidden = hidden, .inner = inner};
    uint32_t *room = PyMem_RawMalloc(num_rows * (hidden + inner) * 2);
    if (!room) {
        release(&buffers);
        return PyErr_NoMemory();
    }
    PyThreadState *saved = PyEval_SaveThread();
    compute(&expert, room);
    PyEval_RestoreThread(saved);
    PyMem_RawFree(room);
    release(&buffers);
    Py_RETURN_NONE;
}
#else
FUNCTION(may_tile) { return are_given(given, 0) ? Py_NewRef(Py_False) : NULL; }

FUNCTION(tiled_ffn) {
    PyErr_SetString(PyExc_ValueError, "built for a processor without tiles");
    return NULL;
}
#endif

/* Rows times packed weights in bfloat16 by AMX tiles, for the kernel of that name in kernels.c.
 *
 * An instruction adds 32 products to each sum: those of even k one by one to zero, those of odd k
 * likewise, and both to the sum (TDPBF16PS). Subnormal numbers are zero. So a sum's bits depend on
 * its row and its weights alone, wherever the row lies in a tile.
 *
 * Letters: P rows, K length of a sum.
 */
#include "kernels.h"

#ifdef HAS_TILES
#include <cpuid.h>
#include <immintrin.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WITH_TILES __attribute__((target("amx-tile,amx-bf16")))
#define MAX_ROWS (2 * SIDE) /* of two tiles */
#define MAX_K 32            /* bfloat16 in a row of a tile */
#define PAIR_BYTES (PANEL * 4)
#define AHEAD_BYTES (16 << 10) /* how far ahead weights are asked for */
#define LINE_BYTES 64
#define TILE_DATA 18 /* what the system is asked to let this process use (arch_prctl) */
#define REQUEST_PERMISSION 0x1023
#define HAS_AMX_BF16 (1u << 22)
#define HAS_AMX_TILE (1u << 24)

/* Whether the processor has tiles, the system lets this process use them, and no variable forbids
 * them: whoever keeps oneDNN from instructions means these too. The interpreter is held. */
int may_use_tiles(void) {
    static int is_known, may_use;
    if (is_known) return may_use;
    is_known = 1;
    unsigned int a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & HAS_AMX_BF16) || !(d & HAS_AMX_TILE) ||
        getenv("ONEDNN_MAX_CPU_ISA") || getenv("DNNL_MAX_CPU_ISA"))
        return 0;
    may_use = !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
    return may_use;
}

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t num_rows[16];
} Tiles;

static void shape_tile(Tiles *tiles, int i, int num_rows, int row_bytes) {
    tiles->num_rows[i] = (uint8_t)num_rows;
    tiles->row_bytes[i] = (uint16_t)(num_rows ? row_bytes : 0);
}

/* Sums of the first rows are tiles 0 and 1, of the others 2 and 3; rows are 4 and 5, weights 6 and
 * 7. There may be no others. */
WITH_TILES static void shape_tiles(int first, int others, int size) {
    Tiles tiles = {.palette = 1};
    for (int i = 0; i < 4; i++) shape_tile(&tiles, i, i < 2 ? first : others, SIDE * 4);
    shape_tile(&tiles, 4, first, size * 2);
    shape_tile(&tiles, 5, others, size * 2);
    for (int i = 6; i < 8; i++) shape_tile(&tiles, i, size / 2, SIDE * 4);
    _tile_loadconfig(&tiles);
}

/* Add to sums [P, PANEL], which are zero where they are first, the products of some steps of K. */
WITH_TILES static void add_products(const char *panel, const char *rows, Py_ssize_t row_bytes,
                                    int has_others, Py_ssize_t num_steps, int is_first,
                                    Py_ssize_t ahead, float *sums) {
    float *others = sums + SIDE * PANEL;
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        if (has_others) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums, PANEL * 4);
        _tile_loadd(1, sums + SIDE, PANEL * 4);
        if (has_others) {
            _tile_loadd(2, others, PANEL * 4);
            _tile_loadd(3, others + SIDE, PANEL * 4);
        }
    }
    while (num_steps--) {
        for (int i = 0; ahead && i < MAX_K / 2 * PAIR_BYTES; i += LINE_BYTES)
            __builtin_prefetch(panel + ahead + i, 0, 2);
        _tile_loadd(4, rows, row_bytes);
        _tile_loadd(6, panel, PAIR_BYTES);
        _tile_loadd(7, panel + SIDE * 4, PAIR_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (has_others) {
            _tile_loadd(5, rows + SIDE * row_bytes, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        panel += MAX_K / 2 * PAIR_BYTES;
        rows += MAX_K * 2;
    }
    _tile_stored(0, sums, PANEL * 4);
    _tile_stored(1, sums + SIDE, PANEL * 4);
    if (has_others) {
        _tile_stored(2, others, PANEL * 4);
        _tile_stored(3, others + SIDE, PANEL * 4);
    }
}

/* The sums [P, PANEL] of a panel's columns, of rows [P, K] with an even K. */
WITH_TILES void multiply_tiles(const char *panel, const char *rows, Py_ssize_t num_rows,
                               Py_ssize_t size, float *sums) {
    Py_ssize_t num_parts = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
    Py_ssize_t num_steps = size / MAX_K, row_bytes = size * 2;
    int left = (int)(size % MAX_K);
    /* What is left of K has smaller tiles, so its sums come back from memory. */
    for (int is_left = 0; is_left < (left ? 2 : 1); is_left++) {
        int shaped = 0;
        const char *weights = panel + (is_left ? num_steps * (MAX_K / 2) * PAIR_BYTES : 0);
        for (Py_ssize_t i = 0; i < num_parts; i++) {
            Py_ssize_t begin = num_rows * i / num_parts;
            int count = (int)(num_rows * (i + 1) / num_parts - begin);
            int first = count < SIDE ? count : SIDE, others = count - first;
            if (count != shaped) shape_tiles(first, others, is_left ? left : MAX_K);
            shaped = count;
            add_products(weights, rows + begin * row_bytes + (is_left ? num_steps * MAX_K * 2 : 0),
                         row_bytes, others > 0, is_left ? 1 : num_steps, !is_left,
                         i ? 0 : AHEAD_BYTES, sums + begin * PANEL);
        }
    }
    _tile_release();
}
#endif

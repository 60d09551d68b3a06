/* AMX tiles in plain C, for processors without: included before native/experts/tiles.c and
 * kernels.c, it takes the place of the instructions and of the questions whether there are any.
 *
 * After the operations in Intel's Software Developer's Manual (LDTILECFG, TILELOADD, TILESTORED,
 * TILEZERO, TDPBF16PS). Whatever would raise a fault there ends the process here.
 */
#pragma once
#include <cpuid.h>
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NEXT_BEST portable /* of the kernels, the one of any processor */
#define __builtin_cpu_supports(feature) 1
#undef __get_cpuid_count
#define __get_cpuid_count(leaf, part, a, b, c, d) (*(a) = *(b) = *(c) = 0, *(d) = ~0u, 1)
#define syscall(...) 0L

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps

#define NUM_TILES 8
#define TILE_ROWS 16
#define ROW_BYTES 64
#define EMULATED static inline __attribute__((unused))

typedef struct {
    int num_rows, row_bytes; /* both are zero where the tile is not valid */
    uint8_t data[TILE_ROWS][ROW_BYTES];
} EmulatedTile;

static __thread EmulatedTile emulated_tiles[NUM_TILES];

EMULATED void require(int is_true, const char *what) {
    if (is_true) return;
    fprintf(stderr, "AMX would fault: %s\n", what);
    abort();
}

EMULATED EmulatedTile *valid_tile(int number) {
    require(number >= 0 && number < NUM_TILES, "no such tile");
    require(emulated_tiles[number].num_rows > 0, "a tile that is not configured");
    return &emulated_tiles[number];
}

EMULATED void emulated_release(void) { memset(emulated_tiles, 0, sizeof emulated_tiles); }

EMULATED void emulated_loadconfig(const void *memory) {
    const uint8_t *bytes = memory;
    require(bytes[0] == 1, "the palette");
    for (int i = 1; i < 16; i++) require(!bytes[i], "reserved bytes");
    emulated_release();
    for (int i = 0; i < 16; i++) {
        int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, num_rows = bytes[48 + i];
        require(i < NUM_TILES || (!row_bytes && !num_rows), "reserved tiles");
        require(row_bytes <= ROW_BYTES && num_rows <= TILE_ROWS, "a tile's size");
        require(!row_bytes == !num_rows, "a tile with rows or columns alone");
        if (i >= NUM_TILES) continue;
        emulated_tiles[i].num_rows = num_rows;
        emulated_tiles[i].row_bytes = row_bytes;
    }
}

EMULATED void emulated_zero(int number) {
    EmulatedTile *tile = valid_tile(number);
    memset(tile->data, 0, sizeof tile->data);
}

EMULATED void emulated_loadd(int number, const void *memory, long stride) {
    EmulatedTile *tile = valid_tile(number);
    memset(tile->data, 0, sizeof tile->data);
    for (int i = 0; i < tile->num_rows; i++)
        memcpy(tile->data[i], (const char *)memory + i * stride, tile->row_bytes);
}

EMULATED void emulated_stored(int number, void *memory, long stride) {
    const EmulatedTile *tile = valid_tile(number);
    for (int i = 0; i < tile->num_rows; i++)
        memcpy((char *)memory + i * stride, tile->data[i], tile->row_bytes);
}

EMULATED float without_subnormals(float value) {
    return fabsf(value) < FLT_MIN ? copysignf(0, value) : value;
}

EMULATED float bfloat16_at(const EmulatedTile *tile, int row, int column) {
    uint16_t half;
    float value;
    memcpy(&half, tile->data[row] + 2 * column, 2);
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, 4);
    return without_subnormals(value);
}

EMULATED void emulated_dpbf16ps(int sums_number, int left_number, int right_number) {
    EmulatedTile *sums = valid_tile(sums_number);
    const EmulatedTile *left = valid_tile(left_number), *right = valid_tile(right_number);
    require(sums != left && sums != right && left != right, "one tile twice");
    require(sums->row_bytes % 4 == 0 && left->row_bytes % 4 == 0 && right->row_bytes % 4 == 0 &&
                sums->num_rows == left->num_rows && left->row_bytes / 4 == right->num_rows &&
                sums->row_bytes == right->row_bytes,
            "tiles that do not fit together");
    for (int m = 0; m < sums->num_rows; m++)
        for (int n = 0; n < sums->row_bytes / 4; n++) {
            float parts[2] = {0, 0}, sum;
            for (int k = 0; k < left->row_bytes / 4; k++)
                for (int i = 0; i < 2; i++)
                    parts[i] = without_subnormals(fmaf(bfloat16_at(left, m, 2 * k + i),
                                                       bfloat16_at(right, k, 2 * n + i), parts[i]));
            memcpy(&sum, sums->data[m] + 4 * n, 4);
            sum = without_subnormals(without_subnormals(sum) +
                                     without_subnormals(parts[0] + parts[1]));
            memcpy(sums->data[m] + 4 * n, &sum, 4);
        }
}

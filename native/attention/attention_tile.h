/* Attention of a tile of rows for one kind of processor; included once for each kind, after
 * attention_products.h, which has the order of sums.
 *
 * Letters as in attention.h; B pages of a block, W a value's room: V up to a multiple of 2 LANES.
 */

/* e to the power of each value of at most 0, to the last bit or two; 0 below -87. With n the whole
 * number next to x / ln 2, it is 2^n times a polynomial of x - n ln 2, whose largest relative error
 * is the least (fitted by Lawson's weights). NaN stays NaN: the last step is a product. */
INLINE Vector NAME(exponential)(Vector x) {
    const float magic = 12582912.0f + 127; /* a sum with it ends with the bits of 2^n's exponent */
    Vector kept = LARGER(SPREAD(-87.0f), x);
    Vector shifted = FUSED(kept, SPREAD(1.44269504f), SPREAD(magic));
    Vector n = shifted - magic, rest = FUSED(n, SPREAD(-0.693359375f), kept);
    rest = FUSED(n, SPREAD(2.12194440e-4f), rest);
    Vector p = FUSED(rest, SPREAD(1.3814540580e-3f), SPREAD(8.3687454462e-3f));
    p = FUSED(p, rest, SPREAD(4.1668388993e-2f));
    p = FUSED(p, rest, SPREAD(1.6666521132e-1f));
    p = FUSED(p, rest, SPREAD(4.9999994040e-1f));
    p = FUSED(p, rest, SPREAD(1.0f));
    p = FUSED(p, rest, SPREAD(1.0f));
    return (Vector)((Whole)(p * (Vector)((Bits)shifted << 23)) & ~(Whole)(x < -87.0f));
}

/* c tanh(x / c) */
INLINE Vector NAME(capped)(Vector x, float softcap) {
    Bits sign = (Bits)x & 0x80000000;
    Vector power = NAME(exponential)((Vector)((Bits)x & 0x7fffffff) * (-2.0f / softcap));
    Vector tanh = (1.0f - power) / (1.0f + power);
    return (Vector)((Bits)(tanh * softcap) | sign);
}

/* Make shares of a row's scores in so many pages, `stride` apart; those of no key are -inf.
 * Returns their sum, in which a sink has a share too. */
INLINE float NAME(soften)(float *scores, Py_ssize_t stride, Py_ssize_t num_pages,
                          const float *sink) {
    Vector most[PARTS], sums[PARTS];
    float all[PAGE];
    for (int v = 0; v < PARTS; v++) most[v] = SPREAD(-INFINITY), sums[v] = (Vector){};
    for (Py_ssize_t p = 0; p < num_pages; p++)
        for (int v = 0; v < PARTS; v++) {
            Vector some = *(const LooseVector *)(scores + p * stride + v * LANES);
            most[v] = LARGER(some, most[v]);
        }
    for (int v = 0; v < PARTS; v++) *(LooseVector *)(all + v * LANES) = most[v];
    float highest = sink ? *sink : -INFINITY;
    for (int i = 0; i < PAGE; i++) highest = all[i] > highest ? all[i] : highest;
    for (Py_ssize_t p = 0; p < num_pages; p++)
        for (int v = 0; v < PARTS; v++) {
            LooseVector *some = (LooseVector *)(scores + p * stride + v * LANES);
            Vector shares = NAME(exponential)(*some - highest);
            sums[v] += shares;
            *some = shares;
        }
    for (int v = 0; v < PARTS; v++) *(LooseVector *)(all + v * LANES) = sums[v];
    for (int half = PAGE / 2; half; half /= 2)
        for (int i = 0; i < half; i++) all[i] += all[i + half];
    if (sink) all[0] += NAME(exponential)(SPREAD(*sink - highest))[0];
    return all[0];
}

/* The values of a row as float32. */
static TARGET void NAME(widen)(const char *row, Py_ssize_t size, Format format, float *wide) {
    Py_ssize_t i = 0, step = bytes_of(format);
    for (; i + LANES <= size; i += LANES) {
        const char *at = row + i * step;
        Vector values;
        if (format == FLOAT32) values = *(const LooseVector *)at;
        else if (format == FLOAT16) values = WIDEN_HALVES(at);
        else values = (Vector)(__builtin_convertvector(*(const Halves *)at, Bits) << 16);
        *(LooseVector *)(wide + i) = values;
    }
    for (; i < size; i++) wide[i] = value_at(row, i, format);
}

/* Rows of `size` values times a factor as columns, which lie `stride` apart; `scratch` has room for
 * four rows. */
static TARGET void NAME(turn)(const char *const *from, Py_ssize_t count, Py_ssize_t size,
                              Format format, float factor, float *scratch, float *columns,
                              Py_ssize_t stride) {
    Py_ssize_t room = padded(size, WIDTH_STEP);
    for (Py_ssize_t r = 0; r < count; r += 4) {
        Py_ssize_t some = least(count - r, 4), d = 0;
        for (Py_ssize_t i = 0; i < some; i++)
            NAME(widen)(from[r + i], size, format, scratch + i * room);
        for (; some == 4 && d + 4 <= size; d += 4) {
            Four rows[4];
            for (int i = 0; i < 4; i++) {
                memcpy(&rows[i], scratch + i * room + d, sizeof(Four));
                rows[i] *= factor;
            }
            transpose(rows);
            for (int i = 0; i < 4; i++)
                memcpy(columns + (d + i) * stride + r, &rows[i], sizeof(Four));
        }
        for (; d < size; d++)
            for (Py_ssize_t i = 0; i < some; i++)
                columns[d * stride + r + i] = scratch[i * room + d] * factor;
    }
}

/* Keys of a page, in columns of any format, as float32. */
static TARGET void NAME(widen_keys)(const char *keys, Py_ssize_t size, Format format,
                                    float *wide) {
    if (format != BFLOAT16) {
        NAME(widen)(keys, size * PAGE, format, wide);
        return;
    }
    for (Py_ssize_t d = 0; d < size; d += 2, keys += PAGE * 4, wide += 2 * PAGE)
        for (int i = 0; i < PAGE; i += LANES) {
            Bits pairs = *(const LooseBits *)(keys + i * 4);
            *(LooseVector *)(wide + i) = (Vector)(pairs << 16);
            if (d + 1 < size) *(LooseVector *)(wide + PAGE + i) = (Vector)(pairs & 0xffff0000);
        }
}

/* A token's values as float32 in the order of sums, with zeros up to `width`. */
static TARGET void NAME(widen_value)(const char *row, Py_ssize_t size, Format format,
                                     float *wide, Py_ssize_t width) {
    if (format != BFLOAT16) {
        NAME(widen)(row, size, format, wide);
        memset(wide + size, 0, (width - size) * sizeof *wide);
        return;
    }
    for (Py_ssize_t w = 0; w < width; w += STEP) {
        Bits pairs = {};
        if (w + STEP <= size) pairs = *(const LooseBits *)(row + w * 2);
        else memcpy(&pairs, row + w * 2, (size - w) * 2);
        *(LooseVector *)(wide + w) = (Vector)(pairs << 16);
        *(LooseVector *)(wide + w + LANES) = (Vector)(pairs & 0xffff0000);
    }
}

/* Round to bfloat16 as to_bfloat16 does; the results are high halves. */
INLINE Bits NAME(rounded)(Vector values) {
    Bits bits = (Bits)values, is_none = (Bits)(values != values);
    return ((bits + 0x7fff + (bits >> 16 & 1)) & ~is_none) | (is_none & 0x7fc00000);
}

/* Round a row's sums [W], divided by the sum of its shares. */
static TARGET void NAME(finish)(const float *sums, float total, Py_ssize_t size, Format format,
                                char *out) {
    for (Py_ssize_t w = 0; w < size; w += STEP) {
        Vector low = *(const LooseVector *)(sums + w) / total;
        Vector high = *(const LooseVector *)(sums + w + LANES) / total;
        char values[STEP * 4];
        if (format == FLOAT32) {
            memcpy(values, &low, sizeof low);
            memcpy(values + sizeof low, &high, sizeof high);
        } else if (format == FLOAT16) {
            NARROW_HALVES(low, (uint16_t *)values);
            NARROW_HALVES(high, (uint16_t *)values + LANES);
        } else {
            Bits pairs = NAME(rounded)(low) >> 16 | (NAME(rounded)(high) & 0xffff0000);
            memcpy(values, &pairs, sizeof pairs);
        }
        char *to = out + w * bytes_of(format);
        if (w + STEP > size) memcpy(to, values, (size - w) * bytes_of(format));
        else if (format == FLOAT32) memcpy(to, values, STEP * 4);
        else memcpy(to, values, STEP * 2);
    }
}

/* What a tile's rows see, and where its numbers are. */
typedef struct {
    const Attention *attention;
    const Tile *tile;
    Py_ssize_t rows, first_page, num_pages;
    float *queries, *sums, *totals, *scores; /* [D, M], [M, W], [M], [pages, M, PAGE] */
    float *narrow, *wide;                    /* [4, D], a block's pages as float32 */
} NAME(Work);
#define Work NAME(Work)

static TARGET void NAME(score_tile)(const Work *work) {
    const Attention *a = work->attention;
    const Tile *tile = work->tile;
    Py_ssize_t rows = work->rows, num_tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    int widens = !a->values || (a->format != FLOAT32 && num_tiles >= WIDEN_TILES);
    Format format = widens ? FLOAT32 : a->format;
    for (Py_ssize_t p = 0; p < work->num_pages; p += BLOCK_PAGES) {
        Py_ssize_t count = least(work->num_pages - p, BLOCK_PAGES);
        const char *pages[2 * BLOCK_PAGES];
        for (Py_ssize_t i = 0; i < count; i++) {
            const char *keys = keys_of(a, tile, work->first_page + p + i);
            float *wide = work->wide + i * a->size * PAGE;
            pages[i] = widens ? (const char *)wide : keys;
            pages[BLOCK_PAGES + i] =
                widens ? pages[i]
                : p + BLOCK_PAGES + i < work->num_pages
                    ? keys_of(a, tile, work->first_page + p + BLOCK_PAGES + i)
                    : values_of(a, tile, work->first_page + least(i, work->num_pages - 1));
            if (!a->values) {
                const char *tokens[PAGE];
                for (int l = 0; l < PAGE; l++) tokens[l] = keys + l * a->size * bytes_of(a->format);
                NAME(turn)(tokens, PAGE, a->size, a->format, 1, work->narrow, wide, PAGE);
            } else if (widens) {
                NAME(widen_keys)(keys, a->size, a->format, wide);
            }
        }
        for (Py_ssize_t t = 0; t < num_tiles; t++) {
            Py_ssize_t r = rows * t / num_tiles;
            NAME(score)(pages, count, work->queries + r, rows, a->size,
                        (int)(rows * (t + 1) / num_tiles - r), format,
                        work->scores + (p * rows + r) * PAGE);
        }
    }
}

static TARGET void NAME(soften_tile)(const Work *work) {
    const Attention *a = work->attention;
    for (Py_ssize_t r = 0; r < work->rows; r++) {
        Seen seen = seen_by(a, work->tile, r);
        Py_ssize_t first = seen.begin / PAGE, num_pages = (seen.end + PAGE - 1) / PAGE - first;
        Py_ssize_t stride = work->rows * PAGE;
        float *scores = work->scores + (first - work->first_page) * stride + r * PAGE;
        float *last = scores + (num_pages - 1) * stride;
        for (Py_ssize_t p = 0; a->softcap && p < num_pages; p++)
            for (int i = 0; i < PAGE; i += LANES) {
                LooseVector *some = (LooseVector *)(scores + p * stride + i);
                *some = NAME(capped)(*some, a->softcap);
            }
        for (Py_ssize_t l = 0; l < seen.begin % PAGE; l++) scores[l] = -INFINITY;
        for (Py_ssize_t l = seen.end - (first + num_pages - 1) * PAGE; l < PAGE; l++)
            last[l] = -INFINITY;
        Py_ssize_t head = work->tile->head * a->heads + (work->tile->begin + r) % a->heads;
        const float *sink = a->sinks ? a->sinks + head : NULL;
        work->totals[r] = NAME(soften)(scores, stride, num_pages, sink);
    }
}

/* First all rows' sums add the tokens before those that all see, row by row, then those that all
 * see, then the rest. So no row touches what it does not see, which may be no number. */
static TARGET void NAME(weigh_tile)(const Work *work) {
    const Attention *a = work->attention;
    Py_ssize_t rows = work->rows, width = padded(a->value_size, STEP);
    Py_ssize_t num_tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    int widens = a->value_size % STEP ||
                 (a->format != FLOAT32 && num_tiles >= WIDEN_TILES);
    Format format = widens ? FLOAT32 : a->format;
    Py_ssize_t own_step = (a->values ? a->value_size : a->size) * bytes_of(a->format);
    Py_ssize_t step = widens ? width * 4 : own_step;
    Seen first = seen_by(a, work->tile, 0), last = seen_by(a, work->tile, rows - 1);
    Py_ssize_t low = last.begin, high = most(first.end, low);
    memset(work->sums, 0, rows * width * sizeof *work->sums);
    for (Py_ssize_t p = 0; p < work->num_pages; p += BLOCK_PAGES) {
        Py_ssize_t base = (work->first_page + p) * PAGE;
        Py_ssize_t begin = most(base, first.begin), end = least(base + BLOCK_PAGES * PAGE, last.end);
        const char *pages[2 * BLOCK_PAGES];
        for (Py_ssize_t i = 0; i < BLOCK_PAGES && base + i * PAGE < end; i++) {
            const char *values = values_of(a, work->tile, work->first_page + p + i);
            float *wide = work->wide + i * PAGE * width;
            Py_ssize_t at = base + i * PAGE;
            Py_ssize_t next = least(p + BLOCK_PAGES + i, work->num_pages - 1);
            pages[i] = widens ? (const char *)wide : values;
            pages[BLOCK_PAGES + i] =
                widens ? pages[i] : values_of(a, work->tile, work->first_page + next);
            for (Py_ssize_t l = most(begin - at, 0); widens && l < least(end - at, PAGE); l++)
                NAME(widen_value)(values + l * own_step, a->value_size, a->format,
                                  wide + l * width, width);
        }
        const float *shares = work->scores + p * rows * PAGE;
#define WEIGH(from, to, row, count)                                                            \
    NAME(weigh)(pages, step, shares, rows, most(from, begin) - base, least(to, end) - base, row, \
                count, format, work->sums, width)
        for (Py_ssize_t r = 0, count; begin < low && r < rows; r += count) {
            Seen seen = seen_by(a, work->tile, r);
            count = rows_of_token(a, work->tile, r);
            WEIGH(seen.begin, least(seen.end, low), r, count);
        }
        WEIGH(low, high, 0, rows);
        for (Py_ssize_t r = 0, count; end > high && r < rows; r += count) {
            Seen seen = seen_by(a, work->tile, r);
            count = rows_of_token(a, work->tile, r);
            WEIGH(most(seen.begin, high), seen.end, r, count);
        }
#undef WEIGH
    }
}

/* Attend a tile's rows in `scratch`, which has the room of scratch_size(). */
static TARGET void NAME(attend)(const Attention *a, const Tile *tile, float *scratch) {
    Py_ssize_t rows = tile->end - tile->begin, width = padded(a->value_size, STEP);
    Py_ssize_t first_page = seen_by(a, tile, 0).begin / PAGE;
    Py_ssize_t end = (seen_by(a, tile, rows - 1).end + PAGE - 1) / PAGE;
    Work work = {.attention = a, .tile = tile, .rows = rows, .first_page = first_page,
                 .num_pages = end - first_page};
    work.queries = scratch;
    work.sums = work.queries + rows * padded(a->size, WIDTH_STEP);
    work.totals = work.sums + rows * padded(a->value_size, WIDTH_STEP);
    work.scores = work.totals + rows * PAGE;
    work.narrow = work.scores + work.num_pages * rows * PAGE;
    work.wide = work.narrow + 4 * padded(a->size, WIDTH_STEP);
    const char *queries[MAX_TILE_ROWS];
    for (Py_ssize_t r = 0; r < rows; r++) queries[r] = query_of(a, tile, r);
    NAME(turn)(queries, rows, a->size, a->format, a->scaling, work.narrow, work.queries, rows);
    NAME(score_tile)(&work);
    NAME(soften_tile)(&work);
    NAME(weigh_tile)(&work);
    for (Py_ssize_t r = 0; r < rows; r++)
        NAME(finish)(work.sums + r * width, work.totals[r], a->value_size, a->format,
                     output_of(a, tile, r));
}

static const AttentionKernel NAME(attention) = {NAME(attend)};

#undef Work
#undef Vector
#undef LooseVector
#undef Whole
#undef Bits
#undef LooseBits
#undef Halves
#undef SCORE_CASE
#undef WEIGH_CASE
#undef CASES
#undef WITH_FORMAT
#undef UNROLLED
#undef PARTS
#undef STEP
#undef INLINE
#undef NAME
#undef NAME_IN
#undef NAME_OF
#undef KERNEL
#undef TARGET
#undef LANES
#undef MAX_ROWS
#undef SCORE_PAGES
#undef VALUE_VECTORS
#undef SPREAD
#undef FUSED
#undef LARGER
#undef WIDEN_HALVES
#undef NARROW_HALVES

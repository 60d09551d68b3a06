/* Attention of a step's tokens, decodes and prefill chunks alike, where the cache has their keys.
 *
 * router/model/cpu/native_attention.py and router/model/kv_cache.py are the faces of these
 * functions. attention.h has the cache's layout, attention_products.h the order of sums.
 *
 * Letters as in attention.h; B sequences.
 */
#include "attention.h"

#include "pool.h"

#define ALONE_PRODUCTS (1 << 18) /* more than these are computed without holding the interpreter */
#define SHARE_PRODUCTS (1 << 21) /* so many are worth a thread of the pool */
#define MAX_HEADS (1 << 16) /* and values of a head */
#define MAX_COUNT (1LL << 36) /* of tokens, pages and strides: no product of sizes overflows */
#define SPAN_NUMBERS 4
#define ALIGNMENT 64 /* of scratch, in bytes */

/* A layout of rows in a cache: `ROWS` as values have it, `COLUMNS` as keys have it. */
typedef enum { ROWS, COLUMNS } Layout;

/* Put one head's row of a token in its place of a page. */
static void store_row(const char *row, Py_ssize_t size, Format format, Layout layout, char *page,
                      Py_ssize_t place) {
    Py_ssize_t value_bytes = bytes_of(format);
    if (layout == ROWS) {
        memcpy(page + place * size * value_bytes, row, size * value_bytes);
    } else if (format == FLOAT32) {
        for (Py_ssize_t d = 0; d < size; d++) memcpy(page + (d * PAGE + place) * 4, row + d * 4, 4);
    } else if (format == FLOAT16) {
        for (Py_ssize_t d = 0; d < size; d++) memcpy(page + (d * PAGE + place) * 2, row + d * 2, 2);
    } else {
        Py_ssize_t d = 0;
        for (; d + 1 < size; d += 2) memcpy(page + (d / 2 * PAGE + place) * 4, row + d * 2, 4);
        if (d < size) memcpy(page + (d / 2 * PAGE + place) * 4, row + d * 2, 2);
    }
}

/* store(rows, cached out, slots [T] int64, (format, layout, N, G, D, values between two tokens'
 * rows and between two heads')) */
FUNCTION(store) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *cached, *slots_view;
    Py_ssize_t format, layout, num_pages, num_heads, size, token_stride, head_stride;
    if (!are_given(given, 4)) return NULL;
    if (!PyTuple_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "sizes must be a tuple");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[3], "nnnnnnn", &format, &layout, &num_pages, &num_heads, &size,
                          &token_stride, &head_stride))
        return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(cached = take(&buffers, args[1], 1))) return NULL;
    if (!(slots_view = take(&buffers, args[2], 0))) return NULL;
    Py_ssize_t num_tokens = slots_view->len / 8;
    const int64_t *slots = slots_view->buf;
    if (format < FLOAT32 || format > FLOAT16 || layout < ROWS || layout > COLUMNS ||
        num_pages < 1 || num_pages > MAX_COUNT || num_heads < 1 || num_heads > MAX_HEADS ||
        size < 1 || size > MAX_HEADS || num_tokens < 1 || num_tokens > MAX_COUNT ||
        token_stride < 0 || token_stride > MAX_HEADS * (Py_ssize_t)MAX_HEADS ||
        head_stride < 0 || head_stride > MAX_COUNT)
        return refuse(&buffers, "sizes must be positive, and of a format and a layout");
    Py_ssize_t value_bytes = bytes_of((Format)format);
    Py_ssize_t page_bytes = layout == ROWS ? size * PAGE * value_bytes
                                           : key_bytes((Format)format, size);
    Py_ssize_t last = (num_heads - 1) * head_stride + size;
    if (cached->len / page_bytes / num_heads != num_pages ||
        cached->len % (page_bytes * num_heads) || rows->len / value_bytes < last ||
        (token_stride && (rows->len / value_bytes - last) / token_stride < num_tokens - 1))
        return refuse(&buffers, "buffers must be as long as the sizes say");
    for (Py_ssize_t t = 0; t < num_tokens; t++)
        if (slots[t] < 0 || slots[t] / PAGE >= num_pages)
            return refuse(&buffers, "a slot beyond the cache");
    PyThreadState *saved = rows->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t t = 0; t < num_tokens; t++)
        for (Py_ssize_t g = 0; g < num_heads; g++)
            store_row((const char *)rows->buf +
                          (t * token_stride + g * head_stride) * value_bytes,
                      size, (Format)format, (Layout)layout,
                      (char *)cached->buf + (slots[t] / PAGE * num_heads + g) * page_bytes,
                      slots[t] % PAGE);
    if (saved) PyEval_RestoreThread(saved);
    release(&buffers);
    Py_RETURN_NONE;
}

/* A step's tiles, which several threads take one after the other. Each has `scratch_bytes` of
 * scratch, aligned as attend() of a kernel wants it. */
typedef struct {
    const Attention *attention;
    const AttentionKernel *kernel;
    const int64_t *spans, *pages; /* [B, 4], see attend() */
    Py_ssize_t num_spans, tile_rows, scratch_bytes, next;
    char *scratch;
} Step;

static Span span_of(const Step *step, Py_ssize_t b) {
    const int64_t *numbers = step->spans + b * SPAN_NUMBERS;
    return (Span){numbers[0], numbers[1], numbers[2], step->pages + numbers[3]};
}

static Py_ssize_t tiles_of(const Step *step, const Span *span) {
    Py_ssize_t rows = span->count * step->attention->heads;
    return (rows + step->tile_rows - 1) / step->tile_rows;
}

static void attend_share(void *given, Py_ssize_t index) {
    Step *step = given;
    Py_ssize_t b = 0, begin = 0; /* the span that the thread is at, and the number of its tiles */
    float *scratch = (float *)(step->scratch + index * step->scratch_bytes);
    if (!step->num_spans) return;
    Span span = span_of(step, 0);
    Py_ssize_t tiles = tiles_of(step, &span);
    for (;;) {
        Py_ssize_t at = __atomic_fetch_add(&step->next, 1, __ATOMIC_RELAXED);
        while (at >= begin + tiles * step->attention->num_kv) {
            begin += tiles * step->attention->num_kv;
            if (++b == step->num_spans) return;
            span = span_of(step, b);
            tiles = tiles_of(step, &span);
        }
        Py_ssize_t first = (at - begin) % tiles * step->tile_rows;
        Tile tile = {.span = &span, .head = (at - begin) / tiles, .begin = first,
                     .end = least(first + step->tile_rows, span.count * step->attention->heads)};
        step->kernel->attend(step->attention, &tile, scratch);
    }
}

/* Check the spans of T tokens and the pages; returns what is wrong, or NULL. `most_pages` is the
 * largest number of pages that a tile sees, `products` how many are computed, roughly. */
static const char *check_spans(const Step *step, Py_ssize_t num_ids, Py_ssize_t num_tokens,
                               Py_ssize_t num_pages, Py_ssize_t *most_pages, double *products) {
    const Attention *a = step->attention;
    Py_ssize_t token = 0;
    *most_pages = 1;
    *products = 0;
    for (Py_ssize_t b = 0; b < step->num_spans; b++) {
        const int64_t *span = step->spans + b * SPAN_NUMBERS;
        if (span[0] != token || span[1] < 1 || span[1] > num_tokens - token)
            return "spans must have all tokens, one after the other";
        if (span[2] < 0 || span[2] > MAX_COUNT || span[3] < 0 || span[3] > num_ids ||
            (span[2] + span[1] + PAGE - 1) / PAGE > num_ids - span[3])
            return "a sequence must have pages for all its tokens";
        token += span[1];
        Py_ssize_t pages = (span[2] + span[1] + PAGE - 1) / PAGE;
        double seen = (double)least(span[2] + span[1], a->window);
        if (a->window < MAX_COUNT) pages = least(pages, (a->window + step->tile_rows) / PAGE + 2);
        *most_pages = most(*most_pages, pages);
        *products += seen * (double)span[1] * (double)(a->num_kv * a->heads * a->size);
    }
    if (token != num_tokens) return "spans must have all tokens, one after the other";
    for (Py_ssize_t i = 0; i < num_ids; i++)
        if (step->pages[i] < 0 || step->pages[i] >= num_pages) return "a page beyond the cache";
    return NULL;
}

/* attend(queries, keys, values or None for latents, spans [B, 4] int64: first token, tokens,
 * position of the first and where its sequence's pages begin; pages int64, out [T, Q, V],
 * (format, T, N, G, Q, D, V, values between two tokens' queries and between two heads'),
 * (scaling, softcap or 0, window or 0), sinks [Q] float32 or None, most threads, kernel or None) */
FUNCTION(attend) {
    Buffers buffers = {.count = 0};
    Py_buffer *queries, *keys, *values = NULL, *spans, *pages, *out, *sinks = NULL;
    Attention a = {0};
    Py_ssize_t format, num_tokens, num_pages, num_q, most_pages;
    double scaling, softcap, products;
    if (!are_given(given, 11)) return NULL;
    Py_ssize_t threads = PyLong_AsSsize_t(args[9]);
    if (PyErr_Occurred()) return NULL;
    const AttentionKernel *kernel = attention_kernel_named(args[10]);
    if (!kernel) return NULL;
    if (!PyTuple_CheckExact(args[6]) || !PyTuple_CheckExact(args[7])) {
        PyErr_SetString(PyExc_TypeError, "sizes and scoring must be tuples");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[6], "nnnnnnnnn", &format, &num_tokens, &num_pages, &a.num_kv, &num_q,
                          &a.size, &a.value_size, &a.token_stride, &a.head_stride) ||
        !PyArg_ParseTuple(args[7], "ddn", &scaling, &softcap, &a.window))
        return NULL;
    if (!(queries = take(&buffers, args[0], 0))) return NULL;
    if (!(keys = take(&buffers, args[1], 0))) return NULL;
    if (args[2] != Py_None && !(values = take(&buffers, args[2], 0))) return NULL;
    if (!(spans = take(&buffers, args[3], 0))) return NULL;
    if (!(pages = take(&buffers, args[4], 0))) return NULL;
    if (!(out = take(&buffers, args[5], 1))) return NULL;
    if (args[8] != Py_None && !(sinks = take(&buffers, args[8], 0))) return NULL;
    const Py_ssize_t heads = MAX_HEADS, much = MAX_COUNT;
    if (format < FLOAT32 || format > FLOAT16 || num_tokens < 1 || num_tokens > much ||
        num_pages < 1 || num_pages > much || a.num_kv < 1 || a.num_kv > heads || num_q < 1 ||
        num_q > heads || num_q % a.num_kv || a.size < 1 || a.size > heads || a.value_size < 1 ||
        a.value_size > heads || a.token_stride < 0 || a.token_stride > much || a.head_stride < 0 ||
        a.head_stride > much || threads < 1 || a.window < 0 || !(softcap >= 0) ||
        (!values && (a.num_kv != 1 || a.value_size > a.size)))
        return refuse(&buffers, "sizes must be positive, and as many heads to each other one");
    a.format = (Format)format;
    Py_ssize_t value_bytes = bytes_of(a.format), plain_bytes = PAGE * a.size * value_bytes;
    Py_ssize_t head_bytes = values ? key_bytes(a.format, a.size) : plain_bytes;
    Py_ssize_t last = (num_q - 1) * a.head_stride + a.size, room = queries->len / value_bytes;
    if (keys->len / head_bytes / a.num_kv != num_pages || keys->len % (head_bytes * a.num_kv) ||
        (values && (values->len / (PAGE * a.value_size * value_bytes) / a.num_kv != num_pages ||
                    values->len % (PAGE * a.value_size * value_bytes * a.num_kv))) ||
        out->len / (num_q * a.value_size * value_bytes) != num_tokens ||
        out->len % (num_q * a.value_size * value_bytes) || room < last ||
        (a.token_stride && (room - last) / a.token_stride < num_tokens - 1) ||
        (sinks && sinks->len != num_q * 4) || spans->len % (8 * SPAN_NUMBERS) || pages->len % 8)
        return refuse(&buffers, "buffers must be as long as the sizes say");
    a.queries = queries->buf, a.keys = keys->buf, a.values = values ? values->buf : NULL;
    a.out = out->buf, a.sinks = sinks ? sinks->buf : NULL;
    a.heads = num_q / a.num_kv;
    a.scaling = (float)scaling, a.softcap = (float)softcap;
    if (!a.window) a.window = MAX_COUNT;
    Py_ssize_t tile_rows = values ? TILE_ROWS : MAX_TILE_ROWS; /* latents are turned for a tile */
    if (a.heads < tile_rows) tile_rows -= tile_rows % a.heads;
    Step step = {.attention = &a, .kernel = kernel, .spans = spans->buf, .pages = pages->buf,
                 .num_spans = spans->len / (8 * SPAN_NUMBERS), .tile_rows = tile_rows};
    const char *wrong = check_spans(&step, pages->len / 8, num_tokens, num_pages, &most_pages,
                                    &products);
    if (wrong) return refuse(&buffers, wrong);
    step.scratch_bytes = padded(scratch_size(&a, tile_rows, most_pages) * 4, ALIGNMENT);
    Py_ssize_t num_tiles = 0;
    for (Py_ssize_t b = 0; b < step.num_spans; b++) {
        Span span = span_of(&step, b);
        num_tiles += tiles_of(&step, &span) * a.num_kv;
    }
    double worth = products / SHARE_PRODUCTS;
    Py_ssize_t num_shares = least(least(threads, num_tiles), MAX_THREADS);
    if (worth < (double)num_shares) num_shares = most((Py_ssize_t)worth, 1);
    char *scratch = PyMem_RawMalloc(num_shares * step.scratch_bytes + ALIGNMENT);
    if (!scratch) {
        release(&buffers);
        return PyErr_NoMemory();
    }
    step.scratch = scratch + ALIGNMENT - (uintptr_t)scratch % ALIGNMENT;
    PyThreadState *saved = products > ALONE_PRODUCTS ? PyEval_SaveThread() : NULL;
    pool_run(attend_share, &step, num_shares, num_shares);
    if (saved) PyEval_RestoreThread(saved);
    PyMem_RawFree(scratch);
    release(&buffers);
    Py_RETURN_NONE;
}

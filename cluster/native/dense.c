/* Small operations of a model's dense part, each in one call and with torch's own bits.
 *
 * router/model/fused_attention.py, router/model/cpu/rms_norm.py and router/model/kv_cache.py are the faces of these functions.
 *
 * Letters: T tokens, N heads, D values of a head (an even number), H values of a row, G key/value
 * heads, S cache slots.
 */
#include "native.h"

#define MOST_VALUES (1 << 30) /* of anything that is counted here; no product of two overflows */

/* store(rows, cached [S, G, D] out, slots [T] int64, (G, S, bytes of a head, bytes between two
 * tokens' heads and between two heads of a token)) */
FUNCTION(store) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *cached, *slots_view;
    Py_ssize_t num_heads, num_slots, row_bytes, token_bytes, head_bytes;
    if (!are_given(given, 4)) return NULL;
    if (!PyTuple_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "sizes must be a tuple");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[3], "nnnnn", &num_heads, &num_slots, &row_bytes, &token_bytes,
                          &head_bytes))
        return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(cached = take(&buffers, args[1], 1))) return NULL;
    if (!(slots_view = take(&buffers, args[2], 0))) return NULL;
    Py_ssize_t num_tokens = slots_view->len / 8;
    const int64_t *slots = slots_view->buf;
    if (num_heads < 1 || num_heads > MOST_VALUES || num_slots < 1 || num_tokens < 1 ||
        num_tokens > MOST_VALUES || row_bytes < 1 || row_bytes > MOST_VALUES || token_bytes < 0 ||
        token_bytes > MOST_VALUES || head_bytes < 0 || head_bytes > MOST_VALUES ||
        cached->len / row_bytes / num_heads != num_slots ||
        cached->len % (row_bytes * num_heads) ||
        rows->len < (num_tokens - 1) * token_bytes + (num_heads - 1) * head_bytes + row_bytes)
        return refuse(&buffers, "buffers must be as long as the sizes say");
    for (Py_ssize_t t = 0; t < num_tokens; t++)
        if (slots[t] < 0 || slots[t] >= num_slots)
            return refuse(&buffers, "a slot beyond the cache");
    PyThreadState *saved = rows->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t t = 0; t < num_tokens; t++)
        for (Py_ssize_t g = 0; g < num_heads; g++)
            memcpy((char *)cached->buf + (slots[t] * num_heads + g) * row_bytes,
                   (const char *)rows->buf + t * token_bytes + g * head_bytes, row_bytes);
    if (saved) PyEval_RestoreThread(saved);
    release(&buffers);
    Py_RETURN_NONE;
}

/* gather_heads(cached [S, G, D], slots [N] int64, out [G, N, D], (G, S, bytes of a head)) */
FUNCTION(gather_heads) {
    Buffers buffers = {.count = 0};
    Py_buffer *cached, *slots_view, *out;
    Py_ssize_t num_heads, num_slots, row_bytes;
    if (!are_given(given, 4)) return NULL;
    if (!PyTuple_CheckExact(args[3])) {
        PyErr_SetString(PyExc_TypeError, "sizes must be a tuple");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[3], "nnn", &num_heads, &num_slots, &row_bytes)) return NULL;
    if (!(cached = take(&buffers, args[0], 0))) return NULL;
    if (!(slots_view = take(&buffers, args[1], 0))) return NULL;
    if (!(out = take(&buffers, args[2], 1))) return NULL;
    Py_ssize_t count = slots_view->len / 8;
    const int64_t *slots = slots_view->buf;
    if (num_heads < 1 || num_heads > MOST_VALUES || num_slots < 1 || row_bytes < 1 ||
        row_bytes > MOST_VALUES || count > MOST_VALUES || slots_view->len % 8 ||
        cached->len / row_bytes / num_heads != num_slots ||
        cached->len % (row_bytes * num_heads) || out->len / row_bytes / num_heads != count ||
        out->len % (row_bytes * num_heads))
        return refuse(&buffers, "buffers must be as long as the sizes say");
    for (Py_ssize_t i = 0; i < count; i++)
        if (slots[i] < 0 || slots[i] >= num_slots)
            return refuse(&buffers, "a slot beyond the cache");
    PyThreadState *saved = out->len > ALONE_BYTES ? PyEval_SaveThread() : NULL;
    for (Py_ssize_t i = 0; i < count; i++)
        for (Py_ssize_t g = 0; g < num_heads; g++)
            memcpy((char *)out->buf + (g * count + i) * row_bytes,
                   (const char *)cached->buf + (slots[i] * num_heads + g) * row_bytes, row_bytes);
    if (saved) PyEval_RestoreThread(saved);
    release(&buffers);
    Py_RETURN_NONE;
}

/* The tokens that grammars forbid, taken from the logits of a step.
 *
 * router/engine/sampling.py is the face of this; it does the same with torch where this is not built.
 *
 * Letters: G rows with a grammar, V vocabulary size, W words of 32 bits with a bit for each token.
 */
#include "native.h"

#define MINUS_INF 0xff800000u /* its bits */
#define WORD 32
#define MAX_ROWS (1 << 20) /* no product overflows */

static inline float less(float logit, uint32_t word, int bit) {
    uint32_t bits = (((word >> bit) & 1u) - 1u) & MINUS_INF;
    float added;
    memcpy(&added, &bits, sizeof added);
    return logit + added; /* NaN stays NaN */
}

FOR_EACH_CPU static void forbid_row(const uint32_t *words, Py_ssize_t vocab, const float *logits,
                                    float *out) {
    Py_ssize_t whole = vocab / WORD;
    for (Py_ssize_t w = 0; w < whole; w++)
        for (int bit = 0; bit < WORD; bit++)
            out[w * WORD + bit] = less(logits[w * WORD + bit], words[w], bit);
    for (Py_ssize_t i = whole * WORD; i < vocab; i++)
        out[i] = less(logits[i], words[whole], (int)(i % WORD));
}

/* forbid(words [G, W] uint32, G, logits [G, V] fp32, out [G, V] fp32)
 * writes the logits, and -inf where a token's bit is 0 */
FUNCTION(forbid) {
    Buffers buffers = {.count = 0};
    Py_buffer *words, *logits, *out;
    if (!are_given(given, 4)) return NULL;
    Py_ssize_t rows = PyLong_AsSsize_t(args[1]);
    if (rows == -1 && PyErr_Occurred()) return NULL;
    if (!(words = take(&buffers, args[0], 0))) return NULL;
    if (!(logits = take(&buffers, args[2], 0))) return NULL;
    if (!(out = take(&buffers, args[3], 1))) return NULL;
    const Py_ssize_t four = sizeof(float);
    if (rows < 1 || rows > MAX_ROWS || words->len % (rows * four) || logits->len % (rows * four) ||
        out->len != logits->len)
        return refuse(&buffers, "words, logits and out must have as many rows");
    Py_ssize_t num_words = words->len / four / rows, vocab = logits->len / four / rows;
    if (num_words < (vocab + WORD - 1) / WORD)
        return refuse(&buffers, "words must have a bit for each logit");
    const uint32_t *word = words->buf;
    const float *from = logits->buf;
    float *to = out->buf;
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t row = 0; row < rows; row++)
        forbid_row(word + row * num_words, vocab, from + row * vocab, to + row * vocab);
    Py_END_ALLOW_THREADS;
    release(&buffers);
    Py_RETURN_NONE;
}

/* The gate of a layer: logits, scores, and the choice of K of E experts for each token.
 *
 * router/model/cpu/native_layer.py is the face of this function; router/moe/gate.py has what is
 * computed, in torch. Logits and scores are float32. Of equal scores that of the lower id is first.
 *
 * Letters: T tokens, H hidden size, E experts, K experts of a token, G groups.
 */
#include "linear.h"

#include <math.h>

#include "bfloat16.h"
#include "float16.h"

#define MAX_EXPERTS (1 << 16)
#define MIN_SUM 1e-20f /* added to a sum of sigmoids, which may be 0 */

typedef enum { SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN } Score;

typedef struct {
    Py_ssize_t num_experts, num_chosen, num_groups, num_best_groups, best_of_group;
    Score score;
    int is_of_all; /* whether a weight does not depend on which experts are allowed */
    int renormalises, is_normalised; /* by the sum; by the sum of absolute values */
    float scaling, lowest; /* a choice's score below those of all experts that are allowed */
    const float *correction; /* [E] or NULL */
} Spec;

/* e to the power of a value of at most 0 (Cephes' polynomial), with the same bits everywhere. */
static float exponential(float x) {
    if (x != x) return x;
    if (x < -87.0f) return 0;
    float n = rintf(x * 1.44269504f), p = 1.9875691500e-4f;
    float rest = x - n * 0.693359375f;
    rest = rest + n * 2.12194440e-4f;
    p = p * rest + 1.3981999507e-3f;
    p = p * rest + 8.3334519073e-3f;
    p = p * rest + 4.1665795894e-2f;
    p = p * rest + 1.6666665459e-1f;
    p = p * rest + 5.0000001201e-1f;
    p = p * rest * rest + rest + 1.0f;
    return ldexpf(p, (int)n);
}

static void soften(float *scores, Py_ssize_t count) {
    float most = -INFINITY, sum = 0;
    for (Py_ssize_t i = 0; i < count; i++) most = scores[i] > most ? scores[i] : most;
    for (Py_ssize_t i = 0; i < count; i++) sum += scores[i] = exponential(scores[i] - most);
    for (Py_ssize_t i = 0; i < count; i++) scores[i] /= sum;
}

static float sigmoid(float x) {
    float small = exponential(x < 0 ? x : -x);
    return (x < 0 ? small : 1) / (1 + small);
}

/* Whether a score comes before another one; what is no number comes first, so that it shows. */
static inline int is_before(float score, float other) {
    return score > other || (score != score && other == other);
}

/* The ids of the `count` best scores, the best first. */
static void choose(const float *scores, Py_ssize_t num_scores, Py_ssize_t count, int64_t *best) {
    Py_ssize_t found = 0;
    for (Py_ssize_t i = 0; i < num_scores; i++) {
        Py_ssize_t at = found;
        while (at && is_before(scores[i], scores[best[at - 1]])) at--;
        if (at == count) continue;
        if (found < count) found++;
        memmove(best + at + 1, best + at, (found - at - 1) * sizeof *best);
        best[at] = i;
    }
}

/* Make the choice scores of all but the best groups lowest; `room` has room for G sums, and for
 * as many ids as there are groups or experts in one. */
static void keep_best_groups(const Spec *s, const uint8_t *allowed, float *scores, float *sums,
                             int64_t *ids) {
    Py_ssize_t size = s->num_experts / s->num_groups, num_allowed = 0;
    for (Py_ssize_t e = 0; allowed && e < s->num_experts; e++) num_allowed += allowed[e];
    /* A row with at most K allowed experts may take them from all groups. */
    if (allowed && num_allowed <= s->num_chosen) return;
    for (Py_ssize_t g = 0; g < s->num_groups; g++) {
        choose(scores + g * size, size, s->best_of_group, ids);
        sums[g] = 0;
        for (Py_ssize_t i = 0; i < s->best_of_group; i++) sums[g] += scores[g * size + ids[i]];
    }
    choose(sums, s->num_groups, s->num_best_groups, ids);
    /* transformers' DeepSeek-V2 has 0 here, a tie with experts whose share rounds to 0. */
    float lowest = !allowed && s->score == SOFTMAX ? 0 : -INFINITY;
    for (Py_ssize_t g = 0; g < s->num_groups; g++) {
        int is_best = 0;
        for (Py_ssize_t i = 0; i < s->num_best_groups; i++) is_best |= ids[i] == g;
        for (Py_ssize_t e = 0; !is_best && e < size; e++) scores[g * size + e] = lowest;
    }
}

/* Weights [K] of the chosen experts by their scores. */
static void weigh(const Spec *s, const uint8_t *allowed, const float *scores, const int64_t *ids,
                  float *weights) {
    float sum = 0, size = 0;
    for (Py_ssize_t i = 0; i < s->num_chosen; i++) weights[i] = scores[ids[i]];
    if (s->score == SOFTMAX_OF_CHOSEN) soften(weights, s->num_chosen);
    for (Py_ssize_t i = 0; i < s->num_chosen; i++) size += fabsf(weights[i]);
    for (Py_ssize_t i = 0; s->is_normalised && i < s->num_chosen; i++) weights[i] /= size;
    for (Py_ssize_t i = 0; i < s->num_chosen; i++) sum += weights[i];
    if (s->score == SIGMOID) sum += MIN_SUM;
    for (Py_ssize_t i = 0; i < s->num_chosen; i++) {
        if (s->renormalises) weights[i] /= sum;
        weights[i] *= s->scaling;
        if (allowed && !allowed[ids[i]]) weights[i] = 0; /* last: a row without any divides by 0 */
    }
}

/* The choice of one token by its logits [E]; `room` takes E + G values. With `forced` ids [K] of 0
 * or more these are the choice, whatever their scores. */
static void choose_experts(const Spec *s, const uint8_t *allowed, const int64_t *forced,
                           float *logits, float *room, int64_t *ids_room, int64_t *ids,
                           float *weights) {
    float *choice = room;
    for (Py_ssize_t e = 0; allowed && !s->is_of_all && e < s->num_experts; e++)
        if (!allowed[e]) logits[e] = -INFINITY;
    if (s->score == SOFTMAX) soften(logits, s->num_experts);
    for (Py_ssize_t e = 0; s->score == SIGMOID && e < s->num_experts; e++)
        logits[e] = sigmoid(logits[e]);
    if (forced && *forced >= 0) {
        memcpy(ids, forced, s->num_chosen * sizeof *ids);
        weigh(s, allowed, logits, ids, weights);
        return;
    }
    for (Py_ssize_t e = 0; e < s->num_experts; e++) {
        choice[e] = s->correction ? logits[e] + s->correction[e] : logits[e];
        if (allowed && !allowed[e]) choice[e] = s->lowest;
    }
    if (s->num_best_groups < s->num_groups)
        keep_best_groups(s, allowed, choice, room + s->num_experts, ids_room);
    choose(choice, s->num_experts, s->num_chosen, ids);
    weigh(s, allowed, logits, ids, weights);
}

/* Whether each row of K ids is of experts, or begins with a negative one, and so is free. */
static int are_experts(const Spec *s, const int64_t *ids, Py_ssize_t num_rows) {
    for (Py_ssize_t i = 0; i < num_rows * s->num_chosen; i++) {
        int is_free = ids[i - i % s->num_chosen] < 0;
        if (!is_free && (ids[i] < 0 || ids[i] >= s->num_experts)) return 0;
    }
    return 1;
}

static int is_spec(const Spec *s) {
    return s->num_experts >= 1 && s->num_experts <= MAX_EXPERTS && s->num_chosen >= 1 &&
           s->num_chosen <= s->num_experts && s->num_groups >= 1 &&
           s->num_groups <= s->num_experts && s->num_experts % s->num_groups == 0 &&
           s->num_best_groups >= 1 && s->num_best_groups <= s->num_groups &&
           s->best_of_group >= 1 && s->best_of_group <= s->num_experts / s->num_groups &&
           s->score >= SOFTMAX && s->score <= SOFTMAX_OF_CHOSEN;
}

/* choose(rows [T, H], packed, correction [E] float32 or None, allowed [T, E] bool or None, ids
 * [T, K] int64 out, weights [T, K] out, (H, E, K, format of the gate's weights, of the rows, of the
 * experts' weights, whether there is a bias, score, whether a weight is of all experts, whether it
 * is divided by the sum, by the sum of absolute values, G, best groups, best of a group), (scaling,
 * lowest), most threads, kernel or None, forced ids [T, K] int64 or None) */
FUNCTION(choose) {
    Buffers buffers = {.count = 0};
    Py_buffer *rows, *packed, *correction = NULL, *allowed = NULL, *ids, *weights;
    Py_buffer *forced = NULL;
    Py_ssize_t hidden;
    int format, row_format, weight_format, has_bias, score;
    Spec s = {0};
    if (!are_given(given, 11)) return NULL;
    if (!PyTuple_CheckExact(args[6]) || !PyTuple_CheckExact(args[7])) {
        PyErr_SetString(PyExc_TypeError, "sizes must be tuples");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[6], "nnniiiiiiiinnn", &hidden, &s.num_experts, &s.num_chosen,
                          &format, &row_format, &weight_format, &has_bias, &score, &s.is_of_all,
                          &s.renormalises, &s.is_normalised, &s.num_groups, &s.num_best_groups,
                          &s.best_of_group) ||
        !PyArg_ParseTuple(args[7], "ff", &s.scaling, &s.lowest))
        return NULL;
    Py_ssize_t threads = PyLong_AsSsize_t(args[8]);
    if (PyErr_Occurred()) return NULL;
    const Kernel *kernel = kernel_named(args[9]);
    if (!kernel) return NULL;
    if (!(rows = take(&buffers, args[0], 0))) return NULL;
    if (!(packed = take(&buffers, args[1], 0))) return NULL;
    if (args[2] != Py_None && !(correction = take(&buffers, args[2], 0))) return NULL;
    if (args[3] != Py_None && !(allowed = take(&buffers, args[3], 0))) return NULL;
    if (!(ids = take(&buffers, args[4], 1))) return NULL;
    if (!(weights = take(&buffers, args[5], 1))) return NULL;
    if (args[10] != Py_None && !(forced = take(&buffers, args[10], 0))) return NULL;
    s.score = (Score)score;
    Matrix matrix;
    if (!take_matrix(packed, hidden, s.num_experts, format, has_bias, &matrix)) {
        release(&buffers);
        return NULL;
    }
    if (!is_spec(&s) || !is_format(row_format) || !is_format(weight_format) || threads < 1 ||
        (correction && correction->len != s.num_experts * 4))
        return refuse(&buffers, "there must be K experts at most, in whole groups");
    Py_ssize_t row_bytes = hidden * bytes_of((Format)row_format), num_rows = rows->len / row_bytes;
    Py_ssize_t weight_bytes = s.num_chosen * bytes_of((Format)weight_format);
    if (rows->len % row_bytes || ids->len / (s.num_chosen * 8) != num_rows ||
        ids->len % (s.num_chosen * 8) || weights->len / weight_bytes != num_rows ||
        weights->len % weight_bytes ||
        (allowed && (allowed->len / s.num_experts != num_rows || allowed->len % s.num_experts)))
        return refuse(&buffers, "there must be whole rows, and a choice for each");
    if (forced && (forced->len != ids->len || !are_experts(&s, forced->buf, num_rows)))
        return refuse(&buffers, "forced ids must be of the layer's experts, K for each row");
    s.correction = correction ? correction->buf : NULL;
    Py_ssize_t values = (num_rows + 1) * s.num_experts + s.num_groups + s.num_chosen;
    float *logits = PyMem_RawMalloc(values * sizeof *logits);
    int64_t *ids_room = PyMem_RawMalloc(s.num_experts * sizeof *ids_room);
    int has_memory = logits && ids_room;
    PyThreadState *saved = PyEval_SaveThread();
    Rows given_rows = {rows->buf, (Format)row_format}, none = {NULL, FLOAT32};
    has_memory = has_memory && multiply_rows(kernel, &matrix, given_rows, num_rows, none,
                                             (char *)logits, FLOAT32, threads);
    for (Py_ssize_t t = 0; has_memory && t < num_rows; t++) {
        float *room = logits + num_rows * s.num_experts;
        float *chosen = room + s.num_experts + s.num_groups;
        choose_experts(&s, allowed ? (const uint8_t *)allowed->buf + t * s.num_experts : NULL,
                       forced ? (const int64_t *)forced->buf + t * s.num_chosen : NULL,
                       logits + t * s.num_experts, room, ids_room,
                       (int64_t *)ids->buf + t * s.num_chosen, chosen);
        for (Py_ssize_t i = 0; i < s.num_chosen; i++) {
            char *to = (char *)weights->buf + t * weight_bytes;
            if (weight_format == FLOAT32) {
                memcpy(to + i * 4, &chosen[i], 4);
                continue;
            }
            uint16_t bits = weight_format == BFLOAT16 ? to_bfloat16(chosen[i])
                                                      : to_float16(chosen[i]);
            memcpy(to + i * 2, &bits, 2);
        }
    }
    PyEval_RestoreThread(saved);
    PyMem_RawFree(ids_room);
    PyMem_RawFree(logits);
    release(&buffers);
    return has_memory ? Py_NewRef(Py_None) : PyErr_NoMemory();
}

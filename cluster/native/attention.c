/* Attention of decoding sequences, read from where the cache has their keys and values.
 *
 * router/model/cpu/native_attention.py is the face of this function.
 *
 * Letters: B sequences of one new token each, L cached tokens, S cache slots, G key/value heads,
 * R query heads to each of them, Q = G * R query heads, D values of a head.
 */
#include "native.h"

#include <math.h>
#include <pthread.h>

#include "bfloat16.h"

#ifndef __clang__
#pragma GCC optimize("fp-contract=fast") /* one rounding for a product and its sum: faster, finer */
#endif

#define ALONE_VALUES (1 << 18) /* more than these are read without holding the interpreter */
#define SHARE_VALUES (1 << 21) /* so many are worth a thread, which takes some 30 us to start */
#define MOST_THREADS 64
#define MOST_HEADS (1 << 12)   /* and values of a head */
#define MOST_SEQS (1 << 24)
#define MOST_SLOTS (1LL << 36) /* and values between two rows: no product of sizes overflows */
#define LANES 16
#define BLOCK (2 * LANES)
#define AHEAD 16 /* rows that are asked for before they are needed: pages are not adjacent */
#define TILE 4 /* query heads that are computed at once; their sums stay in registers */

typedef float Lane __attribute__((vector_size(LANES * 4)));
typedef float LooseLane __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(LANES * 4)));
typedef int32_t LooseWhole __attribute__((vector_size(LANES * 4), aligned(2), may_alias));

/* The values at eight places, and as many that nobody looks at. */
#ifdef __clang__
#define SHUFFLED(lane, ...) __builtin_shufflevector(lane, lane, __VA_ARGS__, 0, 0, 0, 0, 0, 0, 0, 0)
#else
#define SHUFFLED(lane, ...) __builtin_shuffle(lane, (Whole){__VA_ARGS__})
#endif

/* Pairs of bfloat16 are whole numbers whose halves are the high halves of two float32. So values
 * with even places and those with odd ones come apart by a shift and a mask, without a shuffle. */
typedef struct {
    Lane even, odd;
} Pairs;

static inline __attribute__((always_inline)) Pairs wide(const uint16_t *at) {
    Whole pairs = *(const LooseWhole *)at;
    return (Pairs){(Lane)(pairs << 16), (Lane)(pairs & (int32_t)0xffff0000)};
}

static inline __attribute__((always_inline)) float total(Lane lane) {
    lane += SHUFFLED(lane, 8, 9, 10, 11, 12, 13, 14, 15);
    lane += SHUFFLED(lane, 4, 5, 6, 7, 4, 5, 6, 7);
    lane += SHUFFLED(lane, 2, 3, 2, 3, 2, 3, 2, 3);
    return lane[0] + lane[1];
}

/* e to the power of each value of at most 0, to the last bit or two (Cephes' polynomial). */
static inline __attribute__((always_inline)) Lane exponential(Lane x) {
    const float magic = 12582912.0f; /* adding it rounds to whole numbers */
    Whole is_low = x < -87.0f;
    x = (Lane)(((Whole)x & ~is_low) | ((Whole)((Lane){} - 87.0f) & is_low));
    Lane n = x * 1.44269504f + magic;
    Whole exponent = (Whole)n - (Whole)((Lane){} + magic);
    n -= magic;
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lane p = 1.9875691500e-4f * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    Whole is_none = x != x; /* all bits set is no number either */
    return (Lane)((((Whole)p + (exponent << 23)) & ~is_low) | is_none);
}

/* Where a layer's keys or values are, and what of them a sequence looks at. */
typedef struct {
    const uint16_t *keys, *values; /* of one head: D values of each slot, `step` apart */
    const int64_t *slots;          /* [length] */
    Py_ssize_t length, size, step;
} Cached;

static inline __attribute__((always_inline)) void fetch(const Cached *cached, const uint16_t *rows,
                                                        Py_ssize_t l) {
    if (l + AHEAD >= cached->length) return;
    const uint16_t *row = rows + cached->slots[l + AHEAD] * cached->step;
    for (Py_ssize_t d = 0; d < cached->size; d += 32) __builtin_prefetch(row + d);
}

/* scores[r][l] of `count` queries [D] as `widen` has them; rows of scores are `stride` apart. */
static inline __attribute__((always_inline)) void score(const Cached *cached, const float *queries,
                                                        int count, float scaling, float *scores,
                                                        Py_ssize_t stride) {
    Py_ssize_t size = cached->size, whole = size / BLOCK * BLOCK;
    for (Py_ssize_t l = 0; l < cached->length; l++) {
        const uint16_t *key = cached->keys + cached->slots[l] * cached->step;
        fetch(cached, cached->keys, l);
        Lane sums[TILE] = {};
        for (Py_ssize_t d = 0; d < whole; d += BLOCK) {
            Pairs pairs = wide(key + d);
            for (int r = 0; r < count; r++) {
                const LooseLane *query = (const LooseLane *)(queries + r * size + d);
                sums[r] += pairs.even * query[0];
                sums[r] += pairs.odd * query[1];
            }
        }
        for (int r = 0; r < count; r++) {
            float sum = total(sums[r]);
            for (Py_ssize_t d = whole; d < size; d++)
                sum += of_bfloat16(key[d]) * queries[r * size + d];
            scores[r * stride + l] = sum * scaling;
        }
    }
}

/* A query's values [D] as float32: of each block those with even places, then those with odd. */
static void widen(const uint16_t *query, Py_ssize_t size, float *out) {
    Py_ssize_t whole = size / BLOCK * BLOCK;
    for (Py_ssize_t d = 0; d < whole; d++)
        out[d / BLOCK * BLOCK + d % 2 * LANES + d % BLOCK / 2] = of_bfloat16(query[d]);
    for (Py_ssize_t d = whole; d < size; d++) out[d] = of_bfloat16(query[d]);
}

/* Make shares of scores [length], which have room for a multiple of LANES; returns their sum. */
static inline __attribute__((always_inline)) float soften(float *scores, Py_ssize_t length) {
    for (Py_ssize_t l = length; l % LANES; l++) scores[l] = -INFINITY;
    Lane most = *(LooseLane *)scores, sums = {};
    for (Py_ssize_t l = LANES; l < length; l += LANES) {
        Lane some = *(LooseLane *)(scores + l);
        Whole is_more = some > most;
        most = (Lane)(((Whole)some & is_more) | ((Whole)most & ~is_more));
    }
    float highest = most[0];
    for (int i = 1; i < LANES; i++) highest = most[i] > highest ? most[i] : highest;
    for (Py_ssize_t l = 0; l < length; l += LANES) {
        LooseLane *some = (LooseLane *)(scores + l);
        Lane shares = exponential(*some - highest);
        sums += shares;
        *some = shares;
    }
    return total(sums);
}

/* Weigh the values of `blocks` (two at most) blocks from `begin` on, for `count` heads. */
static inline __attribute__((always_inline)) void weigh(const Cached *cached, const float *shares,
                                                        Py_ssize_t stride, const float *sums,
                                                        int count, int blocks, Py_ssize_t begin,
                                                        uint16_t *out) {
    Lane all[TILE][2][2] = {};
    for (Py_ssize_t l = 0; l < cached->length; l++) {
        const uint16_t *value = cached->values + cached->slots[l] * cached->step + begin;
        fetch(cached, cached->values + begin, l);
        for (int i = 0; i < blocks; i++) {
            Pairs pairs = wide(value + i * BLOCK);
            for (int r = 0; r < count; r++) {
                float share = shares[r * stride + l];
                all[r][i][0] += pairs.even * share;
                all[r][i][1] += pairs.odd * share;
            }
        }
    }
    for (int r = 0; r < count; r++)
        for (int i = 0; i < blocks * BLOCK; i++)
            out[r * cached->size + begin + i] =
                to_bfloat16(all[r][i / BLOCK][i % 2][i % BLOCK / 2] / sums[r]);
}

/* Attend `count` heads' queries [D]; `out` are their rows, one after the other. */
static inline __attribute__((always_inline)) void attend_tile(const Cached *cached,
                                                              const float *queries, int count,
                                                              float scaling, float *scores,
                                                              Py_ssize_t stride, uint16_t *out) {
    Py_ssize_t size = cached->size, d = 0;
    float sums[TILE];
    score(cached, queries, count, scaling, scores, stride);
    for (int r = 0; r < count; r++) sums[r] = soften(scores + r * stride, cached->length);
    for (; d + 2 * BLOCK <= size; d += 2 * BLOCK)
        weigh(cached, scores, stride, sums, count, 2, d, out);
    for (; d + BLOCK <= size; d += BLOCK) weigh(cached, scores, stride, sums, count, 1, d, out);
    for (; d < size; d++) {
        for (int r = 0; r < count; r++) {
            float sum = 0;
            for (Py_ssize_t l = 0; l < cached->length; l++)
                sum += scores[r * stride + l] *
                       of_bfloat16(cached->values[cached->slots[l] * cached->step + d]);
            out[r * size + d] = to_bfloat16(sum / sums[r]);
        }
    }
}

/* The heads [R, D] of one sequence that share `cached`. A constant number of them is what makes
 * the compiler keep sums in registers. */
FOR_EACH_CPU
static void attend_heads(const Cached *cached, const float *queries, Py_ssize_t count,
                         float scaling, float *scores, Py_ssize_t stride, uint16_t *out) {
    Py_ssize_t size = cached->size;
    for (; count >= 4; count -= 4, queries += 4 * size, out += 4 * size)
        attend_tile(cached, queries, 4, scaling, scores, stride, out);
    for (; count >= 2; count -= 2, queries += 2 * size, out += 2 * size)
        attend_tile(cached, queries, 2, scaling, scores, stride, out);
    if (count) attend_tile(cached, queries, 1, scaling, scores, stride, out);
}

typedef struct {
    Py_ssize_t num_seqs, num_kv, num_slots, size, num_q, token_stride, head_stride, length;
} Shape;

/* Some sequences' key/value heads, from number b * G + g on, and room to compute them in. */
typedef struct {
    const Shape *shape;
    const uint16_t *queries, *keys, *values;
    const int64_t *slots;
    const uint8_t *mask; /* or NULL: all is seen */
    uint16_t *out;
    float scaling;
    Py_ssize_t begin, end;
    int64_t *seen;        /* [L] */
    float *heads, *scores; /* [R, D], [TILE, L up to a multiple of LANES] */
    pthread_t thread;
    int is_apart;
} Share;

static void *attend_share(void *given) {
    const Share *share = given;
    const Shape *s = share->shape;
    Py_ssize_t count = s->num_q / s->num_kv, stride = (s->length + LANES - 1) / LANES * LANES;
    Cached cached = {.slots = share->seen, .size = s->size, .step = s->num_kv * s->size};
    for (Py_ssize_t at = share->begin; at < share->end; at++) {
        Py_ssize_t b = at / s->num_kv, g = at % s->num_kv, first = g * count;
        if (!g || at == share->begin) {
            cached.length = 0;
            for (Py_ssize_t i = b * s->length; i < (b + 1) * s->length; i++)
                if (!share->mask || share->mask[i]) share->seen[cached.length++] = share->slots[i];
        }
        for (Py_ssize_t r = 0; r < count; r++)
            widen(share->queries + b * s->token_stride + (first + r) * s->head_stride, s->size,
                  share->heads + r * s->size);
        cached.keys = share->keys + g * s->size;
        cached.values = share->values + g * s->size;
        attend_heads(&cached, share->heads, count, share->scaling, share->scores, stride,
                     share->out + (b * s->num_q + first) * s->size);
    }
    return NULL;
}

/* Attend all heads, on several threads where that pays; 0 when there is no memory. */
static int attend_all(const Share *whole, Py_ssize_t num_shares) {
    const Shape *s = whole->shape;
    Py_ssize_t heads = s->num_seqs * s->num_kv, done = 0;
    Py_ssize_t num_scores = TILE * (s->length + LANES), num_values = s->num_q / s->num_kv * s->size;
    Share shares[MOST_THREADS];
    int has_memory = 1;
    for (; done < num_shares && has_memory; done++) {
        Share *share = &shares[done];
        *share = *whole;
        share->begin = heads * done / num_shares;
        share->end = heads * (done + 1) / num_shares;
        share->seen = PyMem_RawMalloc(s->length * 8 + (num_values + num_scores) * 4);
        if (!share->seen) {
            has_memory = 0;
            break;
        }
        share->heads = (float *)(share->seen + s->length);
        share->scores = share->heads + num_values;
        /* The last is this thread's, and whatever no thread can be had for. */
        share->is_apart = done + 1 < num_shares &&
                          !pthread_create(&share->thread, NULL, attend_share, share);
        if (!share->is_apart) attend_share(share);
    }
    while (done--) {
        if (shares[done].is_apart) pthread_join(shares[done].thread, NULL);
        PyMem_RawFree(shares[done].seen);
    }
    return has_memory;
}

/* is_wide() -> whether a vector of LANES is one register here, as attend() takes to be fast */
FUNCTION(is_wide) {
    if (!are_given(given, 0)) return NULL;
    return PyBool_FromLong(IS_WIDE);
}

/* attend(queries bfloat16, keys [S, G, D] bfloat16, values the same, slots [B, L] int64, mask
 * [B, L] bool or None, out [B, Q, D] bfloat16, (B, G, S, D, Q, values between two tokens' queries
 * and between two heads'), scaling, most threads) */
FUNCTION(attend) {
    Buffers buffers = {.count = 0};
    Py_buffer *queries, *keys, *values, *slots, *mask = NULL, *out;
    Shape s;
    if (!are_given(given, 9)) return NULL;
    float scaling = (float)PyFloat_AsDouble(args[7]);
    if (PyErr_Occurred()) return NULL;
    Py_ssize_t threads = PyLong_AsSsize_t(args[8]);
    if (PyErr_Occurred()) return NULL;
    if (!PyTuple_CheckExact(args[6])) {
        PyErr_SetString(PyExc_TypeError, "sizes must be a tuple");
        return NULL;
    }
    if (!PyArg_ParseTuple(args[6], "nnnnnnn", &s.num_seqs, &s.num_kv, &s.num_slots, &s.size,
                          &s.num_q, &s.token_stride, &s.head_stride))
        return NULL;
    if (!(queries = take(&buffers, args[0], 0))) return NULL;
    if (!(keys = take(&buffers, args[1], 0))) return NULL;
    if (!(values = take(&buffers, args[2], 0))) return NULL;
    if (!(slots = take(&buffers, args[3], 0))) return NULL;
    if (args[4] != Py_None && !(mask = take(&buffers, args[4], 0))) return NULL;
    if (!(out = take(&buffers, args[5], 1))) return NULL;
    const Py_ssize_t most = MOST_HEADS, much = MOST_SLOTS;
    if (s.num_seqs < 1 || s.num_seqs > MOST_SEQS || s.num_kv < 1 || s.num_kv > most || s.size < 1 ||
        s.size > most || s.num_q < 1 || s.num_q > most || s.num_q % s.num_kv || s.num_slots < 1 ||
        s.num_slots > much || s.token_stride < 0 || s.token_stride > much || s.head_stride < 0 ||
        s.head_stride > much || threads < 1)
        return refuse(&buffers, "sizes must be positive, and as many heads to each other one");
    s.length = slots->len / 8 / s.num_seqs;
    Py_ssize_t cache_bytes = s.num_kv * s.num_slots * s.size * 2;
    Py_ssize_t last = (s.num_seqs - 1) * s.token_stride + (s.num_q - 1) * s.head_stride + s.size;
    if (s.length < 1 || slots->len != s.num_seqs * s.length * 8 || keys->len != cache_bytes ||
        values->len != cache_bytes || (mask && mask->len != s.num_seqs * s.length) ||
        out->len != s.num_seqs * s.num_q * s.size * 2 || queries->len / 2 < last)
        return refuse(&buffers, "buffers must be as long as the sizes say");
    const int64_t *all = slots->buf;
    const uint8_t *is_seen = mask ? mask->buf : NULL;
    for (Py_ssize_t b = 0; b < s.num_seqs; b++) {
        int sees = 0;
        for (Py_ssize_t i = b * s.length; i < (b + 1) * s.length; i++) {
            if (all[i] < 0 || all[i] >= s.num_slots)
                return refuse(&buffers, "a slot beyond the cache");
            sees |= !is_seen || is_seen[i];
        }
        if (!sees) return refuse(&buffers, "a sequence that sees nothing");
    }
    Share whole = {.shape = &s, .queries = queries->buf, .keys = keys->buf, .values = values->buf,
                   .slots = all, .mask = is_seen, .out = out->buf, .scaling = scaling};
    Py_ssize_t num_rows = s.num_seqs * s.length;
    Py_ssize_t num_values = (num_rows < MOST_SLOTS ? num_rows : MOST_SLOTS) * s.num_q * s.size;
    Py_ssize_t num_shares = num_values / SHARE_VALUES, heads = s.num_seqs * s.num_kv;
    if (num_shares > threads) num_shares = threads;
    if (num_shares > heads) num_shares = heads;
    if (num_shares > MOST_THREADS) num_shares = MOST_THREADS;
    PyThreadState *saved = num_values > ALONE_VALUES ? PyEval_SaveThread() : NULL;
    int has_memory = attend_all(&whole, num_shares < 1 ? 1 : num_shares);
    if (saved) PyEval_RestoreThread(saved);
    release(&buffers);
    if (!has_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

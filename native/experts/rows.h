/* How a layer's pairs are ordered and their rows summed; rows.c has the functions.
 *
 * Letters: T tokens, K experts per token, P pairs, E experts.
 */
#pragma once
#include "native.h"

typedef struct {
    const int64_t *ids; /* of all pairs */
    Py_ssize_t num_ids;
    const int64_t *pairs; /* that are ordered, or NULL for all of them */
    Py_ssize_t num_pairs, k;
    const int64_t *ordered_ids; /* [E] */
    Py_ssize_t num_experts;
} Routing;

/* Find where pairs go, by the order of their experts and then by rank: `next` [E * K + 1] is where the
 * pairs of an expert's index and a rank begin; `index_of` is [E]. What is wrong, or NULL. */
const char *order_pairs(const Routing *routing, Py_ssize_t *index_of, Py_ssize_t *next);

/* Put the pairs in their order, after order_pairs; `next` is where they end then. */
void place_pairs(const Routing *routing, const Py_ssize_t *index_of, Py_ssize_t *next,
                 int64_t *ordered);

/* The place of each pair's row among its token's summands, by ascending expert; see
 * router.moe.permute.summands_of. */
void order_summands(const int64_t *ids, Py_ssize_t num_pairs, Py_ssize_t k, int64_t *summand_of);

/* The weights of pairs, float32 or bfloat16 by their size, as weights of the summands. */
void order_weights(const void *weights, Py_ssize_t weight_bytes, const int64_t *summand_of,
                   Py_ssize_t num_pairs, float *weight_of);

/* Sum each token's rows by their weights, both in the order of the summands; whether all sums are
 * finite. Values are float32, or bfloat16 where they have two bytes. */
int sum_rows(const char *const *row_of, const float *weight_of, Py_ssize_t num_pairs, Py_ssize_t k,
             char *sums, Py_ssize_t row_bytes, Py_ssize_t value_bytes);

/* Rows times a matrix of packed weights. */
#pragma once
#include "kernels.h"

/* Weights as kernels.h has them, for sums of `size` products each. A bias has as many values as the
 * panels have outputs. */
typedef struct {
    const char *panels;
    const float *bias; /* or NULL */
    Py_ssize_t size, outputs;
    Format format;
} Matrix;

/* Rows of float32, bfloat16 or float16, one after the other. */
typedef struct {
    const char *values;
    Format format;
} Rows;

/* Take a matrix from its buffer: panels, then the bias, if it has one; 0 with an error set. */
int take_matrix(const Py_buffer *from, Py_ssize_t size, Py_ssize_t outputs, int format,
                int has_bias, Matrix *matrix);

/* Whether a number is that of a format of rows and weights. */
int is_format(int number);

/* Each of the rows [P, size] times the matrix, plus its bias, plus the same row of `added`
 * [P, outputs] unless that is NULL; each sum rounded once into `out` [P, outputs], which may be
 * `added`. 0 when there is no memory. */
int multiply_rows(const Kernel *kernel, const Matrix *matrix, Rows rows, Py_ssize_t num_rows,
                  Rows added, char *out, Format out_format, Py_ssize_t threads);

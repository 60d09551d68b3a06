/* What the files of the module expertmesh_native share.
 *
 * Whatever comes in is checked against the lengths of the buffers: a wrong number is a ValueError,
 * never an access beyond them.
 */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#if __GNUC__ >= 12 /* older ones do not know it, and are content with less */
#define WIDEST "arch=x86-64-v4"
#else
#define WIDEST "avx512f"
#endif
#ifdef WITHOUT_AVX512 /* for measurements: a wider processor is used as one that ends at AVX2 */
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_CPU __attribute__((target_clones(WIDEST, "avx2", "default")))
#endif
#else
#define FOR_EACH_CPU
#endif

#define ALONE_BYTES (1 << 18) /* more than this is moved without holding the interpreter */

typedef struct {
    Py_buffer views[8]; /* as many as a function takes */
    int count;
} Buffers;

static inline void release(Buffers *buffers) {
    while (buffers->count) PyBuffer_Release(&buffers->views[--buffers->count]);
}

/* Take a contiguous buffer; NULL with an error set, and all before it released, if it is none. */
static inline Py_buffer *take(Buffers *buffers, PyObject *from, int is_output) {
    Py_buffer *view = &buffers->views[buffers->count];
    if (PyObject_GetBuffer(from, view, is_output ? PyBUF_WRITABLE : PyBUF_SIMPLE)) {
        release(buffers);
        return NULL;
    }
    buffers->count++;
    return view;
}

static inline PyObject *refuse(Buffers *buffers, const char *why) {
    release(buffers);
    PyErr_SetString(PyExc_ValueError, why);
    return NULL;
}

static inline int are_given(Py_ssize_t given, Py_ssize_t wanted) {
    if (given == wanted) return 1;
    PyErr_Format(PyExc_TypeError, "takes %zd arguments (given: %zd)", wanted, given);
    return 0;
}

#define FUNCTION(name) \
    PyObject *native_##name(PyObject *self, PyObject *const *args, Py_ssize_t given)

FUNCTION(summands_of);
FUNCTION(route);
FUNCTION(gather);
FUNCTION(combine);
FUNCTION(view);
FUNCTION(send);
FUNCTION(write);
FUNCTION(receive);
FUNCTION(send_layer);
FUNCTION(receive_layer);
FUNCTION(attention_kernels);
FUNCTION(attend);
FUNCTION(store);
FUNCTION(normalise);
FUNCTION(linear);
FUNCTION(attention_inputs);
FUNCTION(attention_outputs);
FUNCTION(attention_half);
FUNCTION(choose);
FUNCTION(forbid);
FUNCTION(draw);
FUNCTION(ffn_kernels);
FUNCTION(ffn);
#ifdef __linux__
FUNCTION(answer_lone);
#endif

extern PyTypeObject native_View;

/* A buffer over memory that is there while `owner` is; NULL with an error set. */
PyObject *view_of(PyObject *owner, void *at, Py_ssize_t size);

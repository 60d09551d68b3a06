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

typedef struct {
    Py_buffer views[5]; /* as many as a function takes */
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

FUNCTION(slots);
FUNCTION(route);
FUNCTION(gather);
FUNCTION(combine);
FUNCTION(pack);
FUNCTION(decode);
FUNCTION(view);
FUNCTION(pieces);
FUNCTION(send);
FUNCTION(receive);

extern PyTypeObject native_View;

/* Tensors' memory as buffers, without a copy.
 *
 * cluster/wire/tensors.py is the face of this.
 */
#include "native.h"

/* A piece of memory that an object owns, as a buffer. */
typedef struct {
    PyObject_HEAD
    PyObject *owner;
    void *at;
    Py_ssize_t size;
} View;

static void view_dealloc(View *self) {
    Py_XDECREF(self->owner);
    PyObject_Free(self);
}

static int view_buffer(View *self, Py_buffer *buffer, int flags) {
    return PyBuffer_FillInfo(buffer, (PyObject *)self, self->at, self->size, 0, flags);
}

static PyBufferProcs view_procs = {(getbufferproc)view_buffer, NULL};

PyTypeObject native_View = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "expertmesh_native.View",
    .tp_basicsize = sizeof(View),
    .tp_dealloc = (destructor)view_dealloc,
    .tp_as_buffer = &view_procs,
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_doc = "Memory of another object.",
};

PyObject *view_of(PyObject *owner, void *at, Py_ssize_t size) {
    View *view = PyObject_New(View, &native_View);
    if (!view) return NULL;
    view->owner = Py_NewRef(owner);
    view->at = at;
    view->size = size;
    return (PyObject *)view;
}

/* view(owner, address, size) -> a memoryview of memory that is there while owner is */
FUNCTION(view) {
    if (!are_given(given, 3)) return NULL;
    void *at = PyLong_AsVoidPtr(args[1]);
    Py_ssize_t size = PyLong_AsSsize_t(args[2]);
    if (PyErr_Occurred()) return NULL;
    if (size < 0 || (!at && size)) {
        PyErr_SetString(PyExc_ValueError, "there must be memory of so many bytes");
        return NULL;
    }
    PyObject *view = view_of(args[0], at, size);
    if (!view) return NULL;
    PyObject *result = PyMemoryView_FromObject(view);
    Py_DECREF(view);
    return result;
}

/* Memory as tensors and tensors' memory, without a copy.
 *
 * cluster/wire/tensors.py is the face of these functions.
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
    View *view = PyObject_New(View, &native_View);
    if (!view) return NULL;
    view->owner = Py_NewRef(args[0]);
    view->at = at;
    view->size = size;
    PyObject *result = PyMemoryView_FromObject((PyObject *)view);
    Py_DECREF(view);
    return result;
}

/* What DLPack prescribes for a tensor that is handed over (https://dmlc.github.io/dlpack/). */
typedef struct {
    int32_t type, id;
} Device;

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} DataType;

typedef struct Managed {
    void *data;
    Device device;
    int32_t num_dimensions;
    DataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
    PyObject *owner;
    void (*deleter)(struct Managed *);
    int64_t sizes[4];
} Managed;

enum { CPU = 1, FLOAT = 2, BFLOAT = 4 };

static void delete_managed(Managed *managed) {
    PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF(managed->owner);
    PyMem_RawFree(managed);
    PyGILState_Release(state);
}

/* Whoever makes a tensor of it renames it, and deletes what is in it when the tensor goes. */
static void delete_capsule(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor"))
        delete_managed(PyCapsule_GetPointer(capsule, "dltensor"));
}

static PyObject *capsule_of(PyObject *owner, char *at, int64_t num_rows, int64_t row_size,
                            int value_bytes, int code) {
    Managed *managed = PyMem_RawCalloc(1, sizeof *managed);
    if (!managed) return PyErr_NoMemory();
    managed->data = at;
    managed->device.type = CPU;
    managed->num_dimensions = 2;
    managed->dtype = (DataType){(uint8_t)code, (uint8_t)(8 * value_bytes), 1};
    managed->shape = managed->sizes;
    managed->strides = managed->sizes + 2;
    managed->sizes[0] = num_rows;
    managed->sizes[1] = managed->sizes[2] = row_size;
    managed->sizes[3] = 1;
    managed->deleter = delete_managed;
    managed->owner = Py_NewRef(owner);
    PyObject *capsule = PyCapsule_New(managed, "dltensor", delete_capsule);
    if (!capsule) delete_managed(managed);
    return capsule;
}

/* pieces(data, counts, row_size, value_bytes, is_bfloat16) -> DLPack's capsules of the rows of the
 * memoryview `data`, the first counts[0] in the first, and so on */
FUNCTION(pieces) {
    Buffers buffers = {.count = 0};
    Py_buffer *view;
    if (!are_given(given, 5)) return NULL;
    Py_ssize_t row_size = PyLong_AsSsize_t(args[2]), value_bytes = PyLong_AsSsize_t(args[3]);
    int is_bfloat16 = PyObject_IsTrue(args[4]);
    if (PyErr_Occurred()) return NULL;
    if (!PyMemoryView_Check(args[0]) || !PyTuple_CheckExact(args[1])) {
        PyErr_SetString(PyExc_TypeError, "takes a memoryview and a tuple");
        return NULL;
    }
    if (!(view = take(&buffers, args[0], 0))) return NULL;
    if (row_size < 1 || row_size > 1 << 30 || value_bytes < 1 || value_bytes > 16)
        return refuse(&buffers, "rows must have values");
    Py_ssize_t row_bytes = row_size * value_bytes, left = view->len / row_bytes;
    Py_ssize_t count = PyTuple_GET_SIZE(args[1]);
    char *at = view->buf;
    PyObject *capsules = PyList_New(count);
    for (Py_ssize_t i = 0; capsules && i < count; i++) {
        Py_ssize_t num_rows = PyLong_AsSsize_t(PyTuple_GET_ITEM(args[1], i));
        PyObject *capsule = NULL;
        if (num_rows < 0 || num_rows > left) {
            if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "more rows than there are");
        } else {
            capsule = capsule_of(args[0], at, num_rows, row_size, (int)value_bytes,
                                 is_bfloat16 ? BFLOAT : FLOAT);
        }
        if (!capsule) {
            Py_CLEAR(capsules);
            break;
        }
        PyList_SET_ITEM(capsules, i, capsule);
        left -= num_rows;
        at += num_rows * row_bytes;
    }
    release(&buffers);
    return capsules;
}

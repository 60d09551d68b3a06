/* Frames' headers, packed and read.
 *
 * cluster/wire/frames.py is the face, and has the limits and the words for what is wrong: whatever is not
 * plainly right is answered by None here, and looked at again there.
 */
#include "native.h"

#define START_BYTES 8 /* version, kind, bytes of the header */
#define ALIGNMENT 16
#define MAX_HEADER_BYTES (1 << 20)
#define MAX_ROWS (1 << 20)
#define MAX_HIDDEN_SIZE (1 << 20)
#define MAX_EXPERTS (1 << 16)
#define MAX_LAYER_ID (1 << 20)
#define MAX_NAME 256
#define MAX_INTEGER INT64_MAX

enum { DISPATCH = 1, ROWS = 2 };

/* Packing. */

typedef struct {
    unsigned char *at, *end;
} Room;

/* One byte that names a type, and a big-endian number of so many bytes; 0 where there is no room. */
static int put(Room *room, int name, uint64_t number, int size) {
    if (room->end - room->at < size + 1) return 0;
    *room->at++ = (unsigned char)name;
    for (int i = size - 1; i >= 0; i--) *room->at++ = (unsigned char)(number >> (8 * i));
    return 1;
}

static int put_integer(Room *room, uint64_t number) {
    if (number < 0x80) return put(room, (int)number, 0, 0);
    if (number <= UINT8_MAX) return put(room, 0xcc, number, 1);
    if (number <= UINT16_MAX) return put(room, 0xcd, number, 2);
    if (number <= UINT32_MAX) return put(room, 0xce, number, 4);
    return put(room, 0xcf, number, 8);
}

/* Put a non-negative integer, a float, a string, or a tuple of those; 0 for anything else. */
static int put_object(Room *room, PyObject *object, int depth) {
    if (PyLong_CheckExact(object)) {
        int overflows;
        long long number = PyLong_AsLongLongAndOverflow(object, &overflows);
        return number >= 0 && !overflows && put_integer(room, (uint64_t)number);
    }
    if (PyFloat_CheckExact(object)) {
        double value = PyFloat_AS_DOUBLE(object);
        uint64_t bits;
        memcpy(&bits, &value, 8);
        return put(room, 0xcb, bits, 8);
    }
    if (PyUnicode_CheckExact(object)) {
        Py_ssize_t size;
        const char *text = PyUnicode_AsUTF8AndSize(object, &size);
        if (!text || size > UINT8_MAX || room->end - room->at < size + 2) return 0;
        if (size < 32) put(room, 0xa0 | (int)size, 0, 0);
        else put(room, 0xd9, (uint64_t)size, 1);
        memcpy(room->at, text, size);
        room->at += size;
        return 1;
    }
    if (!PyTuple_CheckExact(object) || !depth) return 0;
    Py_ssize_t count = PyTuple_GET_SIZE(object);
    if (count < 16 ? !put(room, 0x90 | (int)count, 0, 0)
                   : count > UINT16_MAX || !put(room, 0xdc, (uint64_t)count, 2))
        return 0;
    for (Py_ssize_t i = 0; i < count; i++)
        if (!put_object(room, PyTuple_GET_ITEM(object, i), depth - 1)) return 0;
    return 1;
}

/* pack(version, kind, header) -> the start of a frame, padded; None for an unusual header */
FUNCTION(pack) {
    unsigned char bytes[4096];
    if (!are_given(given, 3)) return NULL;
    long version = PyLong_AsLong(args[0]), kind = PyLong_AsLong(args[1]);
    if (PyErr_Occurred()) return NULL;
    Room room = {bytes + START_BYTES, bytes + sizeof bytes - ALIGNMENT};
    if (!put_object(&room, args[2], 2)) {
        PyErr_Clear(); /* a string that is no UTF-8: msgpack says so */
        Py_RETURN_NONE;
    }
    uint32_t size = (uint32_t)(room.at - bytes - START_BYTES);
    for (int i = 0; i < 2; i++) {
        bytes[i] = (unsigned char)(version >> (8 * i));
        bytes[2 + i] = (unsigned char)(kind >> (8 * i));
    }
    for (int i = 0; i < 4; i++) bytes[4 + i] = (unsigned char)(size >> (8 * i));
    while ((room.at - bytes) % ALIGNMENT) *room.at++ = 0;
    return PyBytes_FromStringAndSize((char *)bytes, room.at - bytes);
}

/* Reading. */

typedef struct {
    const unsigned char *at, *end;
} Text;

static int64_t big_endian(Text *text, int size) {
    uint64_t number = 0;
    for (int i = 0; i < size; i++) number = number << 8 | *text->at++;
    return number > MAX_INTEGER ? -1 : (int64_t)number;
}

/* Return a non-negative integer of at most `most`, or -1. */
static int64_t get_integer(Text *text, int64_t most) {
    if (text->at == text->end) return -1;
    int name = *text->at++;
    int64_t number = name;
    if (name >= 0x80) {
        int size = name >= 0xcc && name <= 0xcf ? 1 << (name - 0xcc) : 0;
        if (!size || text->end - text->at < size) return -1;
        number = big_endian(text, size);
    }
    return number <= most ? number : -1;
}

/* Return the length of a string or an array, or -1. */
static Py_ssize_t get_length(Text *text, int few, int few_mask, int name, int size) {
    if (text->at == text->end) return -1;
    int first = *text->at++;
    if ((first & ~few_mask) == few) return first & few_mask;
    if (first != name || text->end - text->at < size) return -1;
    return (Py_ssize_t)big_endian(text, size);
}

static Py_ssize_t get_array(Text *text) { return get_length(text, 0x90, 0x0f, 0xdc, 2); }

static const char *get_string(Text *text, Py_ssize_t *size) {
    *size = get_length(text, 0xa0, 0x1f, 0xd9, 1);
    if (*size < 1 || text->end - text->at < *size) return NULL;
    const char *from = (const char *)text->at;
    text->at += *size;
    return from;
}

static int get_double(Text *text, double *value) {
    if (text->end - text->at < 9 || *text->at++ != 0xcb) return 0;
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++) bits = bits << 8 | *text->at++;
    memcpy(value, &bits, 8);
    return 1;
}

/* Return the name of a dtype, a reference of the caller's, and its size; NULL for another name. */
static PyObject *get_dtype(Text *text, int *value_bytes) {
    static const struct {
        const char *name;
        int value_bytes;
    } dtypes[] = {{"bfloat16", 2}, {"float16", 2}, {"float32", 4}};
    Py_ssize_t size;
    const char *from = get_string(text, &size);
    for (int i = 0; from && i < 3; i++)
        if (size == (Py_ssize_t)strlen(dtypes[i].name) && !memcmp(from, dtypes[i].name, size)) {
            *value_bytes = dtypes[i].value_bytes;
            return PyUnicode_InternFromString(dtypes[i].name);
        }
    return NULL;
}

/* Return a tuple of so many integers, NULL where they are not; `sum` is theirs. Where they are to
 * ascend, each is at least one more than the one before. */
static PyObject *get_integers(Text *text, Py_ssize_t count, int64_t least, int64_t most,
                              int ascend, int64_t *sum) {
    PyObject *numbers = PyTuple_New(count);
    *sum = 0;
    for (Py_ssize_t i = 0; numbers && i < count; i++) {
        int64_t number = get_integer(text, most);
        PyObject *item = number < least ? NULL : PyLong_FromLongLong(number);
        if (!item) {
            Py_CLEAR(numbers);
            break;
        }
        if (ascend) least = number + 1;
        PyTuple_SET_ITEM(numbers, i, item);
        *sum += number;
    }
    return numbers;
}

/* Return what is from `begin` on of a memoryview, if it is so many bytes. */
static PyObject *rest(PyObject *data, Py_ssize_t begin, Py_ssize_t end, int64_t wanted) {
    if (end - begin != wanted) return NULL;
    PyObject *from = PyLong_FromSsize_t(begin), *piece = NULL;
    PyObject *slice = from ? PySlice_New(from, NULL, NULL) : NULL;
    if (slice) piece = PyObject_GetItem(data, slice);
    Py_XDECREF(slice);
    Py_XDECREF(from);
    return piece;
}

/* The fields of a DispatchFrame without a trace context, in its order; NULL where one is odd. Ids
 * ascend, as routers have them: so they are distinct. */
static PyObject *dispatch_fields(Text *text, PyObject *data, Py_ssize_t begin, Py_ssize_t end) {
    int64_t numbers[3], layer_id, hidden_size = 0, sum, num_pairs = 0;
    PyObject *model = NULL, *ids = NULL, *counts = NULL, *dtype = NULL, *rows = NULL;
    PyObject *fields = NULL;
    Py_ssize_t size, count;
    double deadline_s = 0;
    int value_bytes = 0;
    for (int i = 0; i < 3; i++)
        if ((numbers[i] = get_integer(text, MAX_INTEGER)) < 0) return NULL;
    const char *name = get_string(text, &size);
    if (!name || !(model = PyUnicode_DecodeUTF8(name, size, NULL))) return NULL;
    if (PyUnicode_GET_LENGTH(model) > MAX_NAME) goto odd;
    if ((layer_id = get_integer(text, MAX_LAYER_ID)) < 0) goto odd;
    if ((count = get_array(text)) < 1 || count > MAX_EXPERTS) goto odd;
    if (!(ids = get_integers(text, count, 0, MAX_EXPERTS, 1, &sum))) goto odd;
    if (get_array(text) != count) goto odd;
    if (!(counts = get_integers(text, count, 1, MAX_ROWS, 0, &num_pairs))) goto odd;
    if (num_pairs > MAX_ROWS || !(dtype = get_dtype(text, &value_bytes))) goto odd;
    if ((hidden_size = get_integer(text, MAX_HIDDEN_SIZE)) < 1) goto odd;
    if (!get_double(text, &deadline_s) || text->at != text->end) goto odd;
    if (!(rows = rest(data, begin, end, num_pairs * hidden_size * value_bytes))) goto odd;
    fields = Py_BuildValue("LLLOLOOOLdOO", numbers[0], numbers[1], numbers[2], model, layer_id, ids,
                           counts, dtype, hidden_size, deadline_s, rows, Py_None);
odd:
    Py_XDECREF(model);
    Py_XDECREF(ids);
    Py_XDECREF(counts);
    Py_XDECREF(dtype);
    Py_XDECREF(rows);
    return fields;
}

/* The fields of a RowsFrame, in its order; NULL where one is odd. */
static PyObject *rows_fields(Text *text, PyObject *data, Py_ssize_t begin, Py_ssize_t end) {
    int64_t request_id = get_integer(text, MAX_INTEGER), num_rows, hidden_size = 0;
    int value_bytes = 0;
    PyObject *rows, *dtype = request_id < 0 ? NULL : get_dtype(text, &value_bytes);
    if (!dtype) return NULL;
    PyObject *fields = NULL;
    if ((num_rows = get_integer(text, MAX_ROWS)) >= 1 &&
        (hidden_size = get_integer(text, MAX_HIDDEN_SIZE)) >= 1 && text->at == text->end &&
        (rows = rest(data, begin, end, num_rows * hidden_size * value_bytes))) {
        fields = Py_BuildValue("LOLL(O)", request_id, dtype, num_rows, hidden_size, rows);
        Py_DECREF(rows);
    }
    Py_DECREF(dtype);
    return fields;
}

/* decode(data, version) -> the fields of a dispatch or a rows frame, whose rows are a piece of the
 * memoryview `data`; None for other frames. */
FUNCTION(decode) {
    Buffers buffers = {.count = 0};
    Py_buffer *view;
    if (!are_given(given, 2)) return NULL;
    long version = PyLong_AsLong(args[1]);
    if (version == -1 && PyErr_Occurred()) return NULL;
    if (!(view = take(&buffers, args[0], 0))) return NULL;
    const unsigned char *bytes = view->buf;
    PyObject *fields = NULL;
    if (view->len >= START_BYTES && (bytes[0] | bytes[1] << 8) == version) {
        int kind = bytes[2] | bytes[3] << 8;
        uint32_t size = bytes[4] | bytes[5] << 8 | bytes[6] << 16 | (uint32_t)bytes[7] << 24;
        Py_ssize_t end = START_BYTES + (Py_ssize_t)size;
        Py_ssize_t begin = (end + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        Text text = {bytes + START_BYTES, bytes + end};
        Py_ssize_t count = size <= MAX_HEADER_BYTES && begin <= view->len ? get_array(&text) : -1;
        if (kind == DISPATCH && count == 10)
            fields = dispatch_fields(&text, args[0], begin, view->len);
        else if (kind == ROWS && count == 4)
            fields = rows_fields(&text, args[0], begin, view->len);
    }
    release(&buffers);
    if (fields) return fields;
    PyErr_Clear();
    Py_RETURN_NONE;
}

/* Frames that come alone to an expert actor, answered without the interpreter.
 *
 * experts/lone.py is the face, and says what is left to Python: whatever is not a lone intact dispatch
 * frame for native experts of one shape. Python computes the same answers (experts/queue.py). After
 * products the caches have neither the interpreter nor its objects, so that at one stream Python took as
 * long as the products. cluster/wire/frames.py has the fields of frames, channel.py those of messages.
 *
 * Letters: P rows of a frame, E experts, H hidden size.
 */
#include "wire.h"

#ifdef __linux__
#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "kernels.h"

#define MAX_EXPERTS 64 /* of a frame */
#define MAX_WAIT_MS 1000

enum { STEPS, FRAMES, BUSY_S, WAITING, NUM_COUNTS }; /* the actor's counters */

/* A dispatch frame for experts that are here. */
typedef struct {
    uint64_t call_id, request_id;
    unsigned version, dtype;
    Py_ssize_t num_rows, num_experts, hidden, row_bytes;
    Py_ssize_t ids[MAX_EXPERTS], counts[MAX_EXPERTS];
    const unsigned char *layer; /* number and model, which lie beside each other */
    Py_ssize_t layer_bytes;
    char *rows;
} Lone;

/* Read the only message of `received` bytes; 0 where it is another one, or not whole. */
static int read_lone(unsigned char *start, Py_ssize_t received, unsigned version, Lone *lone) {
    if (received < START_BYTES + FIXED_BYTES) return 0;
    uint64_t length = number_at(start, 8);
    const unsigned char *frame = start + START_BYTES;
    if (length > (uint64_t)received || length < FIXED_BYTES ||
        START_BYTES + padded((Py_ssize_t)length) != received)
        return 0;
    *lone = (Lone){.call_id = number_at(start + 8, 8), .version = (unsigned)number_at(frame, 2),
                   .dtype = frame[3], .num_experts = (Py_ssize_t)number_at(frame + 5, 2),
                   .request_id = number_at(frame + 9, 8), .num_rows = (Py_ssize_t)number_at(frame + 17, 4)};
    Py_ssize_t num_axes = frame[4], name_bytes = frame[7], trace_bytes = frame[8];
    Py_ssize_t counts_at = FIXED_BYTES + 4 + 2 * lone->num_experts;
    Py_ssize_t time_at = counts_at + 4 * lone->num_experts, layer_at = time_at + 8;
    Py_ssize_t rows_at = padded(layer_at + 4 + name_bytes), sum = 0;
    if (lone->version != version || frame[2] != DISPATCH || num_axes != 1 || trace_bytes ||
        !name_bytes || lone->num_experts < 1 || lone->num_experts > MAX_EXPERTS ||
        (Py_ssize_t)length < rows_at)
        return 0;
    for (Py_ssize_t i = 0; i < lone->num_experts; i++) {
        lone->ids[i] = (Py_ssize_t)number_at(frame + FIXED_BYTES + 4 + 2 * i, 2);
        lone->counts[i] = (Py_ssize_t)number_at(frame + counts_at + 4 * i, 4);
        for (Py_ssize_t j = 0; j < i; j++)
            if (lone->ids[j] == lone->ids[i]) return 0;
        if (!lone->counts[i]) return 0;
        sum += lone->counts[i];
    }
    uint64_t bits = number_at(frame + time_at, 8);
    double time_left_s;
    memcpy(&time_left_s, &bits, sizeof time_left_s);
    lone->hidden = (Py_ssize_t)number_at(frame + FIXED_BYTES, 4);
    lone->layer = frame + layer_at;
    lone->layer_bytes = 4 + name_bytes;
    lone->rows = (char *)frame + rows_at;
    lone->row_bytes = lone->num_rows ? ((Py_ssize_t)length - rows_at) / lone->num_rows : 0;
    return time_left_s > 0 && sum == lone->num_rows && lone->hidden > 0 &&
           lone->row_bytes * lone->num_rows == (Py_ssize_t)length - rows_at;
}

/* The experts of a layer, as experts/lone.py gives them; `layer` keeps the rest. */
typedef struct {
    PyObject *layer, *packed, *tokens, *sizes, *threads;
} Layer;

/* Find the experts of a frame in `layers`; a new tuple of their packed weights. NULL where one is not
 * here or takes other rows, with an error set only if something failed. */
static PyObject *find_experts(PyObject *layers, const Lone *lone, Layer *layer) {
    PyObject *key = PyBytes_FromStringAndSize((const char *)lone->layer, lone->layer_bytes);
    PyObject *found = key ? PyDict_GetItemWithError(layers, key) : NULL;
    Py_ssize_t hidden, inner;
    int weights, rows, activation;
    Py_XDECREF(key);
    if (!found) return NULL;
    if (!PyTuple_CheckExact(found) ||
        !PyArg_ParseTuple(found, "O!O!O!O", &PyDict_Type, &layer->packed, &PyDict_Type,
                          &layer->tokens, &PyTuple_Type, &layer->sizes, &layer->threads) ||
        !PyArg_ParseTuple(layer->sizes, "nniii", &hidden, &inner, &weights, &rows, &activation))
        return NULL;
    /* The dtypes of frames begin at one, the formats of rows at zero; both have the same order. */
    if (hidden != lone->hidden || rows != (int)lone->dtype - 1 || rows < FLOAT32 ||
        rows > FLOAT16 || lone->row_bytes != hidden * bytes_of((Format)rows))
        return NULL;
    PyObject *experts = PyTuple_New(lone->num_experts);
    for (Py_ssize_t i = 0; experts && i < lone->num_experts; i++) {
        PyObject *id = PyLong_FromSsize_t(lone->ids[i]);
        PyObject *packed = id ? PyDict_GetItemWithError(layer->packed, id) : NULL;
        Py_XDECREF(id);
        if (packed) PyTuple_SET_ITEM(experts, i, Py_NewRef(packed));
        else Py_CLEAR(experts);
    }
    if (experts) layer->layer = Py_NewRef(found);
    return experts;
}

/* Count the rows that each expert has computed; 0 with an error set. */
static int count_tokens(const Lone *lone, const Layer *layer) {
    for (Py_ssize_t i = 0; i < lone->num_experts; i++) {
        PyObject *id = PyLong_FromSsize_t(lone->ids[i]), *sum = NULL;
        PyObject *before = id ? PyDict_GetItemWithError(layer->tokens, id) : NULL;
        if (!PyErr_Occurred())
            sum = PyLong_FromSsize_t(lone->counts[i] + (before ? PyLong_AsSsize_t(before) : 0));
        int is_counted = sum && !PyErr_Occurred() && !PyDict_SetItem(layer->tokens, id, sum);
        Py_XDECREF(sum);
        Py_XDECREF(id);
        if (!is_counted) return 0;
    }
    return 1;
}

FOR_EACH_CPU static int are_finite(const char *values, Py_ssize_t bytes, unsigned dtype) {
    uint32_t largest = 0;
    if (dtype == 1) {
        const uint32_t *bits = (const uint32_t *)values;
        for (Py_ssize_t i = 0; i < bytes / 4; i++)
            largest = (bits[i] & 0x7f800000u) > largest ? bits[i] & 0x7f800000u : largest;
        return largest != 0x7f800000u;
    }
    uint16_t exponent = dtype == 2 ? 0x7f80 : 0x7c00, most = 0;
    const uint16_t *bits = (const uint16_t *)values;
    for (Py_ssize_t i = 0; i < bytes / 2; i++)
        most = (bits[i] & exponent) > most ? bits[i] & exponent : most;
    return most != exponent;
}

/* Compute the rows of a frame; a new answer of bytes. NULL where Python has to, with an error set only
 * if something failed. */
static PyObject *compute(const Lone *lone, PyObject *layers, double *counters) {
    Layer layer;
    PyObject *experts = find_experts(layers, lone, &layer);
    if (!experts) return NULL;
    double begun_at_s = now_s();
    Py_ssize_t bytes = lone->num_rows * lone->row_bytes;
    PyObject *answer = PyBytes_FromStringAndSize(NULL, ANSWER_BYTES + bytes);
    PyObject *counts = PyTuple_New(lone->num_experts), *rows = NULL, *out = NULL, *result = NULL;
    for (Py_ssize_t i = 0; counts && i < lone->num_experts; i++) {
        PyObject *count = PyLong_FromSsize_t(lone->counts[i]);
        if (count) PyTuple_SET_ITEM(counts, i, count);
        else Py_CLEAR(counts);
    }
    char *out_rows = answer ? PyBytes_AS_STRING(answer) + ANSWER_BYTES : NULL;
    if (answer && counts && (rows = view_of(Py_None, lone->rows, bytes)) &&
        (out = view_of(Py_None, out_rows, bytes))) {
        PyObject *const args[] = {rows, counts, experts, out, layer.sizes, layer.threads, Py_None};
        counters[WAITING] = (double)lone->num_rows;
        result = native_ffn(NULL, args, 7);
        counters[WAITING] = 0;
    }
    int is_whole = result && are_finite(out_rows, bytes, lone->dtype) && count_tokens(lone, &layer);
    if (is_whole) {
        Fixed fixed = {.version = lone->version, .kind = ROWS, .dtype = lone->dtype,
                       .num_rows = lone->num_rows, .request_id = lone->request_id};
        put_answer((unsigned char *)PyBytes_AS_STRING(answer), &fixed, lone->hidden);
        counters[STEPS]++;
        counters[FRAMES]++;
        counters[BUSY_S] += now_s() - begun_at_s;
    } else {
        Py_CLEAR(answer);
    }
    Py_XDECREF(result);
    Py_XDECREF(out);
    Py_XDECREF(rows);
    Py_XDECREF(counts);
    Py_DECREF(experts);
    Py_DECREF(layer.layer);
    return answer;
}

/* Send an answer; how many bytes of it are left, or -1 where that failed. */
static Py_ssize_t send_answer(int fd, uint64_t call_id, PyObject *answer) {
    static unsigned char padding[ALIGNMENT];
    unsigned char start[START_BYTES];
    Py_ssize_t length = PyBytes_GET_SIZE(answer), whole = START_BYTES + padded(length);
    put_start(start, length, call_id);
    struct iovec pieces[] = {{start, START_BYTES},
                             {PyBytes_AS_STRING(answer), (size_t)length},
                             {padding, (size_t)(whole - START_BYTES - length)}};
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 3};
    ssize_t sent;
    Py_BEGIN_ALLOW_THREADS
    do sent = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (sent < 0 && errno == EINTR);
    Py_END_ALLOW_THREADS
    if (sent < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? whole : -1;
    return whole - sent;
}

/* Wait for an event of one socket alone that has a buffer, and receive what is there. The number of
 * bytes, 0 for whatever else happens, and where it is the time. */
static Py_ssize_t receive_alone(int epoll_fd, PyObject *buffers, int wait_ms, int *fd,
                                PyObject **buffer, Py_buffer *room) {
    struct epoll_event events[2];
    int count;
    Py_BEGIN_ALLOW_THREADS
    count = epoll_wait(epoll_fd, events, 2, wait_ms);
    Py_END_ALLOW_THREADS
    if (count != 1 || events[0].events != EPOLLIN) return 0;
    PyObject *key = PyLong_FromLong(*fd = events[0].data.fd);
    *buffer = key ? PyDict_GetItemWithError(buffers, key) : NULL;
    Py_XDECREF(key);
    if (!*buffer || PyObject_GetBuffer(*buffer, room, PyBUF_WRITABLE)) return 0;
    ssize_t received = recv(*fd, room->buf, (size_t)room->len, MSG_DONTWAIT);
    if (received <= 0) PyBuffer_Release(room); /* a peer that has closed shows so again */
    return received > 0 ? received : 0;
}

/* answer_lone(epoll fd, {fd: buffer}, {layer: (packed weights by id, tokens by id, sizes, threads)},
 * counters float64, version of frames, wait_ms) -> None where Python has to look what happened, or as
 * long as given nothing did; else (fd, received bytes, None), for Python to read, or (fd, 0, (id of the
 * call, answer, how many bytes are left to be sent, or -1 where that failed)) */
FUNCTION(answer_lone) {
    Buffers taken = {.count = 0};
    Py_buffer *counters;
    if (!are_given(given, 6)) return NULL;
    int epoll_fd = (int)PyLong_AsLong(args[0]);
    unsigned version = (unsigned)PyLong_AsUnsignedLong(args[4]);
    long wait_ms = PyLong_AsLong(args[5]);
    if (PyErr_Occurred()) return NULL;
    if (!PyDict_Check(args[1]) || !PyDict_Check(args[2]) || wait_ms < 0 || wait_ms > MAX_WAIT_MS) {
        PyErr_SetString(PyExc_ValueError, "dictionaries, and a short wait");
        return NULL;
    }
    if (!(counters = take(&taken, args[3], 1))) return NULL;
    if (counters->len != NUM_COUNTS * (Py_ssize_t)sizeof(double))
        return refuse(&taken, "there must be room for all counters");
    double until_s = now_s() + 1e-3 * (double)wait_ms, left_s;
    PyObject *result = NULL;
    while (!result && (left_s = until_s - now_s()) > 0) {
        Py_buffer room;
        PyObject *buffer;
        int fd;
        Py_ssize_t received =
            receive_alone(epoll_fd, args[1], (int)(1e3 * left_s) + 1, &fd, &buffer, &room);
        if (!received) break;
        Lone lone;
        PyObject *answer = NULL;
        if (read_lone(room.buf, received, version, &lone))
            answer = compute(&lone, args[2], counters->buf);
        if (!answer) {
            PyErr_Clear(); /* Python computes the frame, and answers what fails then too */
            result = Py_BuildValue("inO", fd, received, Py_None);
        } else {
            Py_ssize_t left = send_answer(fd, lone.call_id, answer);
            if (left)
                result = Py_BuildValue("in(KOn)", fd, (Py_ssize_t)0,
                                       (unsigned long long)lone.call_id, answer, left);
        }
        Py_XDECREF(answer);
        PyBuffer_Release(&room);
        if (PyErr_Occurred()) break;
    }
    release(&taken);
    if (PyErr_Occurred()) {
        Py_XDECREF(result);
        return NULL;
    }
    return result ? result : Py_NewRef(Py_None);
}
#endif

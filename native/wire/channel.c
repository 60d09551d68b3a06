/* Messages over a socket.
 *
 * cluster/transport/stream/channel.py is the face, and does the same without this.
 */
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "wire.h"

#define MAX_BUFFERS 64
#define MAX_WAIT_MS 1000

/* Whether to call again: a signal came and its handler let it go on. */
static int is_interrupted(void) { return errno == EINTR && !PyErr_CheckSignals(); }

/* Whether a call that failed would only have to wait; where not, there is an exception. */
static int may_wait(void) {
    if (PyErr_Occurred()) return 0;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return 1;
    PyErr_SetFromErrno(PyExc_OSError);
    return 0;
}

/* send(fd, call_id, buffers, most) -> how many bytes of the message are left to be sent; None for many
 * buffers, or for more than `most` bytes */
FUNCTION(send) {
    static unsigned char padding[ALIGNMENT];
    unsigned char start[START_BYTES];
    struct iovec pieces[MAX_BUFFERS + 2] = {{start, START_BYTES}};
    Py_buffer views[MAX_BUFFERS];
    Py_ssize_t count = 0, length = 0, taken = 0;
    if (!are_given(given, 4)) return NULL;
    int fd = (int)PyLong_AsLong(args[0]); /* that of a closed socket is an OSError */
    uint64_t call_id = PyLong_AsUnsignedLongLong(args[1]);
    Py_ssize_t most = PyLong_AsSsize_t(args[3]);
    if (PyErr_Occurred()) return NULL;
    if (!PyTuple_CheckExact(args[2]) || (count = PyTuple_GET_SIZE(args[2])) > MAX_BUFFERS)
        Py_RETURN_NONE;
    PyObject *result = NULL;
    for (; taken < count; taken++) {
        PyObject *buffer = PyTuple_GET_ITEM(args[2], taken);
        if (PyObject_GetBuffer(buffer, &views[taken], PyBUF_SIMPLE)) goto done;
        pieces[1 + taken] = (struct iovec){views[taken].buf, views[taken].len};
        length += views[taken].len;
    }
    if (length > most) {
        result = Py_NewRef(Py_None);
        goto done;
    }
    pieces[1 + count] = (struct iovec){padding, padded(length) - length};
    put_start(start, length, call_id);
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = (size_t)count + 2};
    ssize_t sent;
    do {
        Py_BEGIN_ALLOW_THREADS
        sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        Py_END_ALLOW_THREADS
    } while (sent < 0 && is_interrupted());
    Py_ssize_t whole = START_BYTES + padded(length);
    if (sent < 0 && !may_wait()) goto done;
    result = PyLong_FromSsize_t(whole - (sent < 0 ? 0 : sent));
done:
    while (taken) PyBuffer_Release(&views[--taken]);
    return result;
}

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000) + now.tv_nsec / 1000000;
}

/* Send pieces until all are gone or `wait_ms` have passed; without the interpreter. Returns how many
 * bytes were sent; -1, and errno, where the connection is gone. */
static Py_ssize_t write_pieces(int fd, struct iovec *pieces, size_t count, int64_t wait_ms) {
    int64_t until_ms = now_ms() + wait_ms, left_ms = wait_ms;
    Py_ssize_t written = 0;
    while (count) {
        struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue; /* signals are the main thread's */
        if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK) return -1;
        if (sent < 0) {
            struct pollfd waited = {fd, POLLOUT, 0};
            if (left_ms <= 0) break;
            poll(&waited, 1, (int)left_ms);
        } else {
            written += sent;
            for (; count && (size_t)sent >= pieces->iov_len; pieces++, count--)
                sent -= (ssize_t)pieces->iov_len;
            if (count) {
                pieces->iov_base = (char *)pieces->iov_base + sent;
                pieces->iov_len -= (size_t)sent;
            }
        }
        left_ms = until_ms - now_ms();
    }
    return written;
}

/* write(fd, buffers, wait_ms) -> how many bytes of a tuple of buffers were sent: all of them, or what
 * the peer took within a while */
FUNCTION(write) {
    struct iovec pieces[MAX_BUFFERS];
    Py_buffer views[MAX_BUFFERS];
    Py_ssize_t count = 0, taken = 0, written = -1;
    if (!are_given(given, 3)) return NULL;
    int fd = (int)PyLong_AsLong(args[0]); /* that of a closed socket is an OSError */
    long wait_ms = PyLong_AsLong(args[2]);
    if (PyErr_Occurred()) return NULL;
    if (!PyTuple_CheckExact(args[1]) || (count = PyTuple_GET_SIZE(args[1])) > MAX_BUFFERS ||
        wait_ms < 0 || wait_ms > MAX_WAIT_MS) {
        PyErr_SetString(PyExc_ValueError, "a tuple of few buffers, and a short wait");
        return NULL;
    }
    for (; taken < count; taken++) {
        PyObject *buffer = PyTuple_GET_ITEM(args[1], taken);
        if (PyObject_GetBuffer(buffer, &views[taken], PyBUF_SIMPLE)) goto done;
        pieces[taken] = (struct iovec){views[taken].buf, (size_t)views[taken].len};
    }
    Py_BEGIN_ALLOW_THREADS
    written = write_pieces(fd, pieces, (size_t)count, wait_ms);
    Py_END_ALLOW_THREADS
    if (written < 0) PyErr_SetFromErrno(PyExc_OSError);
done:
    while (taken) PyBuffer_Release(&views[--taken]);
    return written < 0 ? NULL : PyLong_FromSsize_t(written);
}

/* Return (id of the call, the message's bytes as a piece of the memoryview `data`). */
static PyObject *message_of(uint64_t call_id, PyObject *data, Py_ssize_t begin, Py_ssize_t end) {
    PyObject *slice = NULL, *piece = NULL, *message = NULL;
    PyObject *from = PyLong_FromSsize_t(begin), *to = PyLong_FromSsize_t(end);
    if (from && to && (slice = PySlice_New(from, to, NULL)) &&
        (piece = PyObject_GetItem(data, slice)))
        message = Py_BuildValue("KO", (unsigned long long)call_id, piece);
    Py_XDECREF(piece);
    Py_XDECREF(slice);
    Py_XDECREF(from);
    Py_XDECREF(to);
    return message;
}

/* receive(fd, buffer, begin, end, most, wait_ms) -> (begin, end, messages): receive behind `end`
 * what is there, or comes within a while if nothing is, and find the messages that are whole from
 * `begin` on, (id of the call, a piece of the memoryview `buffer`) each. None where nothing is
 * there. ConnectionError where the peer has closed, or a message has more than `most` bytes. */
FUNCTION(receive) {
    Py_buffer buffer;
    if (!are_given(given, 6)) return NULL;
    int fd = (int)PyLong_AsLong(args[0]); /* that of a closed socket is an OSError */
    Py_ssize_t begin = PyLong_AsSsize_t(args[2]), end = PyLong_AsSsize_t(args[3]);
    Py_ssize_t most = PyLong_AsSsize_t(args[4]);
    long wait_ms = PyLong_AsLong(args[5]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[1], &buffer, PyBUF_WRITABLE)) return NULL;
    PyObject *messages = NULL, *result = NULL;
    if (begin < 0 || end < begin || buffer.len <= end || most < 0 || wait_ms < 0 ||
        wait_ms > MAX_WAIT_MS) {
        PyErr_SetString(PyExc_ValueError, "there must be room behind what has come");
        goto done;
    }
    ssize_t received;
    do {
        struct pollfd waited = {fd, POLLIN, 0};
        Py_BEGIN_ALLOW_THREADS
        if (wait_ms) poll(&waited, 1, (int)wait_ms);
        received = recv(fd, (char *)buffer.buf + end, buffer.len - end, 0);
        Py_END_ALLOW_THREADS
    } while (received < 0 && is_interrupted());
    if (received < 0) {
        if (may_wait()) result = Py_NewRef(Py_None);
        goto done;
    }
    if (!received) {
        PyErr_SetString(PyExc_ConnectionError, "the peer closed the stream");
        goto done;
    }
    end += received;
    if (!(messages = PyList_New(0))) goto done;
    while (end - begin >= START_BYTES) {
        const unsigned char *start = (unsigned char *)buffer.buf + begin;
        uint64_t length = number_at(start, 8);
        if (length > (uint64_t)most) {
            PyErr_Format(PyExc_ConnectionError, "a message of %llu bytes; at most %zd",
                         (unsigned long long)length, most);
            goto done;
        }
        Py_ssize_t at = begin + START_BYTES, size = (Py_ssize_t)length;
        Py_ssize_t next = at + padded(size);
        if (next > end) break;
        PyObject *message = message_of(number_at(start + 8, 8), args[1], at, at + size);
        int is_kept = message && !PyList_Append(messages, message);
        Py_XDECREF(message);
        if (!is_kept) goto done;
        begin = next;
    }
    result = Py_BuildValue("nnO", begin, end, messages);
done:
    Py_XDECREF(messages);
    PyBuffer_Release(&buffer);
    return result;
}

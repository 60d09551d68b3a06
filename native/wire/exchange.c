/* A layer's frames to expert actors and their answers, in two calls.
 *
 * router/moe/exchange.py is the face. In a step of few tokens most of a layer's time was Python between a
 * dozen native calls, since other processes have had the caches meanwhile. What these functions cannot do
 * at once they leave to router/moe/dispatch.py, which goes on from there: they say how many bytes of each
 * message are left, or have come. The messages are those that Python would send, byte for byte.
 *
 * Letters: T tokens, K experts per token, P = T * K pairs, E experts, H values of a row, A actors of a
 * layer. A part is what one actor computes.
 */
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "rows.h"
#include "wire.h"

#define MAX_PAIRS 512
#define MAX_EXPERTS 4096
#define MAX_CHOSEN 64 /* experts of a token */
#define MAX_ACTORS 32
#define MAX_SIZE (1 << 20) /* of a row */
#define MAX_WAIT_MS 1000
#define ANY_OFFSET(experts, k) ((experts) * (k) + 1)

/* A part, in the order of the layer's actors. */
typedef struct {
    Py_ssize_t begin, end; /* of its pairs */
    Py_ssize_t first, last; /* of its experts, by index */
    Py_ssize_t actor, lane;
} LayerPart;

/* A layer and its actors; borrowed from the arguments. */
typedef struct {
    Routing routing;
    Py_buffer *ends, *lane_of;
    const char *name; /* the layer's number and the model, as a frame has them */
    Py_ssize_t name_bytes, size, row_bytes, num_lanes, num_parts, most_rows;
    unsigned dtype, version;
    const int32_t *fds;
    int64_t *last; /* the number of each lane's latest answer, and of the latest of all */
    PyObject *buffers;
    Py_ssize_t *index_of, *offsets; /* of pairs; one that the pairs are placed by follows */
    int64_t *ordered;
    LayerPart parts[MAX_ACTORS];
    Py_ssize_t order[MAX_ACTORS]; /* of sending, by the parts' indices */
} Layer;

/* The actor that answered last gets its part first (cluster/transport/stream/client.py). */
static void order_parts(Layer *l) {
    for (Py_ssize_t i = 0; i < l->num_parts; i++) {
        Py_ssize_t at = i;
        int64_t answered = l->last[l->parts[i].lane];
        for (; at && l->last[l->parts[l->order[at - 1]].lane] < answered; at--)
            l->order[at] = l->order[at - 1];
        l->order[at] = i;
    }
}

/* Divide the pairs among the actors; what is wrong, or NULL. */
static const char *divide(Layer *l) {
    Routing *r = &l->routing;
    Py_ssize_t num_offsets = ANY_OFFSET(r->num_experts, r->k);
    const char *wrong = order_pairs(r, l->index_of, l->offsets);
    if (wrong) return wrong;
    Py_ssize_t *next = l->offsets + num_offsets;
    memcpy(next, l->offsets, num_offsets * sizeof *next);
    place_pairs(r, l->index_of, next, l->ordered);
    const int64_t *ends = l->ends->buf, *lane_of = l->lane_of->buf;
    Py_ssize_t num_actors = l->ends->len / 8;
    if (!num_actors || ends[num_actors - 1] != r->num_experts) return "experts without an actor";
    for (Py_ssize_t a = 0; a < num_actors; a++) {
        Py_ssize_t first = a ? ends[a - 1] : 0, last = ends[a];
        if (last < first || last > r->num_experts || lane_of[a] < 0 || lane_of[a] >= l->num_lanes)
            return "an actor beyond the experts or the lanes";
        Py_ssize_t begin = l->offsets[first * r->k], end = l->offsets[last * r->k];
        if (begin == end) continue;
        if (end - begin > l->most_rows) l->most_rows = end - begin;
        l->parts[l->num_parts++] = (LayerPart){begin, end, first, last, a, lane_of[a]};
    }
    order_parts(l);
    return NULL;
}

/* Take a layer, (ids of experts in order [E] int64, where each actor's end [A] int64, lanes of the actors
 * [A] int64, name, K, H, dtype, version), and the lanes, (sockets int32, buffers, latest answers int64);
 * 0 with an error set. The caller frees `index_of`. */
static int take_layer(PyObject *layer, PyObject *lanes, const Py_buffer *ids, Buffers *taken,
                      Layer *l) {
    PyObject *objects[5];
    Py_buffer *ordered_ids, *fds, *last;
    const char *name;
    Py_ssize_t name_bytes, k, size;
    int dtype, version;
    if (!PyTuple_CheckExact(layer) || !PyTuple_CheckExact(lanes)) {
        PyErr_SetString(PyExc_TypeError, "a layer and its lanes must be tuples");
        return 0;
    }
    if (!PyArg_ParseTuple(layer, "OOOy#nnii", &objects[0], &objects[1], &objects[2], &name,
                          &name_bytes, &k, &size, &dtype, &version) ||
        !PyArg_ParseTuple(lanes, "OO!O", &objects[3], &PyTuple_Type, &l->buffers, &objects[4]))
        return 0;
    if (!(ordered_ids = take(taken, objects[0], 0)) || !(l->ends = take(taken, objects[1], 0)) ||
        !(l->lane_of = take(taken, objects[2], 0)) || !(fds = take(taken, objects[3], 0)) ||
        !(last = take(taken, objects[4], 1)))
        return 0;
    Py_ssize_t num_pairs = ids->len / 8, num_experts = ordered_ids->len / 8;
    l->num_lanes = PyTuple_GET_SIZE(l->buffers);
    if (k < 1 || k > MAX_CHOSEN || num_pairs < 1 || num_pairs > MAX_PAIRS || num_pairs % k ||
        num_experts < 1 || num_experts > MAX_EXPERTS || l->ends->len != l->lane_of->len ||
        l->ends->len / 8 > MAX_ACTORS || size < 1 || size > MAX_SIZE || name_bytes < 5 ||
        name_bytes > 4 + 255 || (dtype != 1 && dtype != 2) || fds->len != l->num_lanes * 4 ||
        last->len != (l->num_lanes + 1) * 8) {
        PyErr_SetString(PyExc_ValueError, "a layer of few pairs, and a lane for each actor");
        return 0;
    }
    Py_ssize_t num_offsets = ANY_OFFSET(num_experts, k);
    l->routing = (Routing){ids->buf, num_pairs, NULL, num_pairs, k, ordered_ids->buf, num_experts};
    l->name = name;
    l->name_bytes = name_bytes;
    l->size = size;
    l->row_bytes = size * (dtype == 1 ? 4 : 2);
    l->dtype = (unsigned)dtype;
    l->version = (unsigned)version;
    l->fds = fds->buf;
    l->last = last->buf;
    l->index_of = PyMem_Malloc((num_experts + 2 * num_offsets + num_pairs) * sizeof(int64_t));
    if (!l->index_of) {
        PyErr_NoMemory();
        return 0;
    }
    l->offsets = l->index_of + num_experts;
    l->ordered = (int64_t *)(l->offsets + 2 * num_offsets);
    const char *wrong = divide(l);
    if (!wrong) return 1;
    PyErr_SetString(PyExc_ValueError, wrong);
    return 0;
}

/* Write a part's header with padding; returns its bytes. There is room for all experts. */
static Py_ssize_t put_header(const Layer *l, const LayerPart *part, uint64_t request_id,
                             double time_left_s, unsigned char *at) {
    Py_ssize_t k = l->routing.k, count = 0, end = FIXED_BYTES + 4;
    for (Py_ssize_t i = part->first; i < part->last; i++)
        count += l->offsets[i * k] < l->offsets[(i + 1) * k];
    Fixed fixed = {.version = l->version, .kind = DISPATCH, .dtype = l->dtype, .num_experts = count,
                   .name_bytes = l->name_bytes - 4, .num_rows = part->end - part->begin,
                   .request_id = request_id};
    put_fixed(at, &fixed);
    put_number(at + FIXED_BYTES, (uint64_t)l->size, 4);
    unsigned char *counts = at + end + 2 * count;
    for (Py_ssize_t i = part->first; i < part->last; i++) {
        Py_ssize_t rows = l->offsets[(i + 1) * k] - l->offsets[i * k];
        if (!rows) continue;
        put_number(at + end, (uint64_t)l->routing.ordered_ids[i], 2);
        put_number(counts, (uint64_t)rows, 4);
        end += 2;
        counts += 4;
    }
    uint64_t bits;
    memcpy(&bits, &time_left_s, sizeof bits);
    put_number(counts, bits, 8);
    memcpy(counts + 8, l->name, l->name_bytes);
    end = counts + 8 + l->name_bytes - at;
    memset(at + end, 0, padded(end) - end);
    return padded(end);
}

/* Send a part's message; how many bytes of it are left, or -1 where nothing could be sent. */
static Py_ssize_t send_part(const Layer *l, const LayerPart *part, const char *rows, uint64_t call_id,
                            unsigned char *header, Py_ssize_t header_bytes) {
    static unsigned char padding[ALIGNMENT];
    unsigned char start[START_BYTES];
    struct iovec pieces[MAX_PAIRS + 3] = {{start, START_BYTES}, {header, (size_t)header_bytes}};
    Py_ssize_t count = part->end - part->begin, length = header_bytes + count * l->row_bytes;
    put_start(start, length, call_id);
    for (Py_ssize_t i = 0; i < count; i++)
        pieces[2 + i] = (struct iovec){
            (char *)rows + l->ordered[part->begin + i] / l->routing.k * l->row_bytes,
            (size_t)l->row_bytes};
    pieces[2 + count] = (struct iovec){padding, (size_t)(padded(length) - length)};
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = (size_t)count + 3};
    ssize_t sent;
    do sent = sendmsg(l->fds[part->lane], &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (sent < 0 && errno == EINTR);
    if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK) return -1;
    return START_BYTES + padded(length) - (sent < 0 ? 0 : sent);
}

/* A number for each part. */
static PyObject *tuple_of(const Py_ssize_t *numbers, Py_ssize_t count) {
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t n = 0; tuple && n < count; n++) {
        PyObject *number = PyLong_FromSsize_t(numbers[n]);
        if (number) PyTuple_SET_ITEM(tuple, n, number);
        else Py_CLEAR(tuple);
    }
    return tuple;
}

/* send_layer(rows [T, H], ids [P] int64, layer, lanes, id of the first part's call, of the request,
 * time_left_s) -> None where all is sent, or for each part how many bytes are left; -1 where nothing
 * could be sent */
FUNCTION(send_layer) {
    Buffers taken = {.count = 0};
    Layer layer = {0};
    Py_buffer *rows, *ids;
    if (!are_given(given, 7)) return NULL;
    uint64_t call_id = PyLong_AsUnsignedLongLong(args[4]);
    uint64_t request_id = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[5]);
    double time_left_s = PyErr_Occurred() ? 0 : PyFloat_AsDouble(args[6]);
    if (PyErr_Occurred()) return NULL;
    if (!(rows = take(&taken, args[0], 0)) || !(ids = take(&taken, args[1], 0))) return NULL;
    if (!take_layer(args[2], args[3], ids, &taken, &layer)) {
        PyMem_Free(layer.index_of);
        release(&taken);
        return NULL;
    }
    Py_ssize_t num_tokens = layer.routing.num_pairs / layer.routing.k;
    Py_ssize_t room = padded(FIXED_BYTES + 4 + 6 * layer.routing.num_experts + 8 + layer.name_bytes);
    int has_rows = rows->len == num_tokens * layer.row_bytes;
    unsigned char *header = has_rows ? PyMem_Malloc(room) : NULL;
    PyObject *result = NULL;
    if (!has_rows) {
        PyErr_SetString(PyExc_ValueError, "there must be a row for each token");
    } else if (!header) {
        PyErr_NoMemory();
    } else {
        Py_ssize_t left[MAX_ACTORS], is_whole = 1;
        PyThreadState *saved = PyEval_SaveThread();
        for (Py_ssize_t i = 0; i < layer.num_parts; i++) {
            Py_ssize_t n = layer.order[i];
            Py_ssize_t bytes = put_header(&layer, &layer.parts[n], request_id, time_left_s, header);
            left[n] = send_part(&layer, &layer.parts[n], rows->buf, call_id + (uint64_t)n, header,
                                bytes);
            is_whole &= !left[n];
        }
        PyEval_RestoreThread(saved);
        result = is_whole ? Py_NewRef(Py_None) : tuple_of(left, layer.num_parts);
    }
    PyMem_Free(header);
    PyMem_Free(layer.index_of);
    release(&taken);
    return result;
}

/* Receive a part's message, which has `bytes`, into `room`; how many bytes have come by the time. */
static Py_ssize_t receive_part(int fd, char *room, Py_ssize_t bytes, int wait_ms, int *has_waited) {
    double until_s = now_s() + 1e-3 * wait_ms;
    Py_ssize_t got = 0;
    while (got < bytes) {
        ssize_t received = recv(fd, room + got, (size_t)(bytes - got), MSG_DONTWAIT);
        if (received > 0) {
            got += received;
            continue;
        }
        int may_wait = received < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR);
        double left_s = until_s - now_s();
        if (!may_wait || left_s <= 0) break;
        struct pollfd waited = {fd, POLLIN, 0};
        *has_waited = 1;
        poll(&waited, 1, (int)(1e3 * left_s) + 1);
    }
    return got;
}

/* Whether a message is the answer of a part: its rows, neither more nor less. */
static int is_answer(const Layer *l, const LayerPart *part, const char *room, uint64_t call_id,
                     uint64_t request_id) {
    unsigned char expected[START_BYTES + ANSWER_BYTES];
    Fixed fixed = {.version = l->version, .kind = ROWS, .dtype = l->dtype,
                   .num_rows = part->end - part->begin, .request_id = request_id};
    put_start(expected, ANSWER_BYTES + fixed.num_rows * l->row_bytes, call_id);
    put_answer(expected + START_BYTES, &fixed, l->size);
    return !memcmp(expected, room, sizeof expected);
}

/* Receive all parts, the last sent first; whether they are whole. `rooms` are the parts' buffers, and
 * `got` the bytes that each has. */
static int receive_parts(Layer *l, const Py_buffer *rooms, uint64_t call_id, uint64_t request_id,
                         int wait_ms, Py_ssize_t *got, int *has_waited) {
    for (Py_ssize_t i = l->num_parts - 1; i >= 0; i--) {
        Py_ssize_t n = l->order[i];
        const LayerPart *part = &l->parts[n];
        Py_ssize_t length = ANSWER_BYTES + (part->end - part->begin) * l->row_bytes;
        Py_ssize_t bytes = START_BYTES + padded(length);
        char *room = rooms[n].buf;
        if (bytes > rooms[n].len) return 0;
        got[n] = receive_part(l->fds[part->lane], room, bytes, wait_ms, has_waited);
        if (got[n] < bytes || !is_answer(l, part, room, call_id + (uint64_t)n, request_id)) return 0;
        l->last[part->lane] = ++l->last[l->num_lanes];
    }
    return 1;
}

/* Sum the rows that have come; whether the sums are finite. */
static int combine_parts(const Layer *l, const Py_buffer *rooms, const Py_buffer *weights,
                         char *sums) {
    const Routing *r = &l->routing;
    Py_ssize_t num_pairs = r->num_pairs;
    int64_t summand_of[MAX_PAIRS];
    const char *row_of[MAX_PAIRS];
    float weight_of[MAX_PAIRS];
    order_summands(r->ids, num_pairs, r->k, summand_of);
    order_weights(weights->buf, weights->len / num_pairs, summand_of, num_pairs, weight_of);
    for (Py_ssize_t n = 0; n < l->num_parts; n++) {
        const char *row = (char *)rooms[n].buf + START_BYTES + ANSWER_BYTES;
        for (Py_ssize_t i = l->parts[n].begin; i < l->parts[n].end; i++, row += l->row_bytes)
            row_of[summand_of[l->ordered[i]]] = row;
    }
    return sum_rows(row_of, weight_of, num_pairs, r->k, sums, l->row_bytes, l->dtype == 1 ? 4 : 2);
}

/* receive_layer(ids [P] int64, weights [P], sums [T, H] out, layer, lanes, id of the first part's call, of
 * the request, wait_ms) -> (actors that were asked, a bit each; rows of the largest part; whether any
 * answer was waited for; None where the sums are made and finite, or for each part how many bytes have
 * come into its lane's buffer) */
FUNCTION(receive_layer) {
    Buffers taken = {.count = 0};
    Layer layer = {0};
    Py_buffer *ids, *weights, *sums, rooms[MAX_ACTORS];
    Py_ssize_t got[MAX_ACTORS] = {0}, num_rooms = 0;
    if (!are_given(given, 8)) return NULL;
    uint64_t call_id = PyLong_AsUnsignedLongLong(args[5]);
    uint64_t request_id = PyErr_Occurred() ? 0 : PyLong_AsUnsignedLongLong(args[6]);
    long wait_ms = PyErr_Occurred() ? 0 : PyLong_AsLong(args[7]);
    if (PyErr_Occurred()) return NULL;
    if (!(ids = take(&taken, args[0], 0)) || !(weights = take(&taken, args[1], 0)) ||
        !(sums = take(&taken, args[2], 1)))
        return NULL;
    PyObject *result = NULL;
    if (!take_layer(args[3], args[4], ids, &taken, &layer)) goto done;
    Py_ssize_t num_pairs = layer.routing.num_pairs, weight_bytes = weights->len / num_pairs;
    if (sums->len != num_pairs / layer.routing.k * layer.row_bytes || weights->len % num_pairs ||
        (weight_bytes != 2 && weight_bytes != 4) || wait_ms < 0 || wait_ms > MAX_WAIT_MS) {
        PyErr_SetString(PyExc_ValueError, "a weight for each pair, a sum for each token, a short wait");
        goto done;
    }
    unsigned long long asked = 0;
    for (; num_rooms < layer.num_parts; num_rooms++) {
        const LayerPart *part = &layer.parts[num_rooms];
        asked |= 1ull << part->actor;
        PyObject *buffer = PyTuple_GET_ITEM(layer.buffers, part->lane);
        if (PyObject_GetBuffer(buffer, &rooms[num_rooms], PyBUF_WRITABLE)) goto done;
    }
    int has_waited = 0;
    PyThreadState *saved = PyEval_SaveThread();
    int is_whole = receive_parts(&layer, rooms, call_id, request_id, (int)wait_ms, got, &has_waited);
    PyEval_RestoreThread(saved);
    is_whole = is_whole && combine_parts(&layer, rooms, weights, sums->buf);
    PyObject *received = is_whole ? Py_NewRef(Py_None) : tuple_of(got, layer.num_parts);
    if (received) result = Py_BuildValue("KniN", asked, layer.most_rows, has_waited, received);
done:
    while (num_rooms) PyBuffer_Release(&rooms[--num_rooms]);
    PyMem_Free(layer.index_of);
    release(&taken);
    return result;
}

/* Messages and frames as bytes: cluster/transport/stream/channel.py has the fields of messages,
 * cluster/wire/frames.py those of frames. All numbers are little-endian. */
#pragma once
#include <time.h>

#include "native.h"

#define START_BYTES 16 /* of a message: length, id of the call */
#define ALIGNMENT 16
#define FIXED_BYTES 21 /* of a frame's header, the same in each kind */
#define ANSWER_BYTES 32 /* of the header of rows with one axis, with padding */

enum { DISPATCH = 1, ROWS = 2 }; /* kinds of frames */

static inline uint64_t number_at(const unsigned char *at, int bytes) {
    uint64_t number = 0;
    for (int i = bytes - 1; i >= 0; i--) number = number << 8 | at[i];
    return number;
}

static inline void put_number(unsigned char *at, uint64_t number, int bytes) {
    for (int i = 0; i < bytes; i++) at[i] = (unsigned char)(number >> (8 * i));
}

static inline Py_ssize_t padded(Py_ssize_t bytes) {
    return bytes + (-bytes & (ALIGNMENT - 1));
}

static inline void put_start(unsigned char *at, Py_ssize_t length, uint64_t call_id) {
    put_number(at, (uint64_t)length, 8);
    put_number(at + 8, call_id, 8);
}

/* What the headers of all kinds begin with; `num_experts` and `name_bytes` are of dispatch frames. */
typedef struct {
    unsigned version, kind, dtype;
    Py_ssize_t num_experts, name_bytes, num_rows;
    uint64_t request_id;
} Fixed;

static inline void put_fixed(unsigned char *at, const Fixed *fixed) {
    put_number(at, fixed->version, 2);
    at[2] = (unsigned char)fixed->kind;
    at[3] = (unsigned char)fixed->dtype;
    at[4] = 1; /* axis of a row */
    put_number(at + 5, (uint64_t)fixed->num_experts, 2);
    at[7] = (unsigned char)fixed->name_bytes;
    at[8] = 0; /* bytes of a trace context */
    put_number(at + 9, fixed->request_id, 8);
    put_number(at + 17, (uint64_t)fixed->num_rows, 4);
}

/* Write the header of rows of `size` values. */
static inline void put_answer(unsigned char *at, const Fixed *fixed, Py_ssize_t size) {
    memset(at, 0, ANSWER_BYTES);
    put_fixed(at, fixed);
    put_number(at + FIXED_BYTES, (uint64_t)size, 4);
}

static inline double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

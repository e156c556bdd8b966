/* RESP2, the Redis serialization protocol: encoder and incremental decoder.
 *
 * Pure functions over buffers: no I/O, no allocation in the decoder. The decoder is fed whatever bytes have arrived and
 * hands out one event at a time; a bulk string's content comes as it arrives (RESP_DATA), so that a large value can be
 * decoded straight from the receive buffer.  Source: https://redis.io/docs/latest/develop/reference/protocol-spec/
 */
#ifndef SMLT_RESP_H
#define SMLT_RESP_H

#include <stddef.h>
#include <stdint.h>

#define RESP_MAX_DEPTH 8
#define RESP_MAX_LINE 65536                 /* an error reply or an inline status; anything longer is no Redis */
#define RESP_MAX_BULK (512LL * 1024 * 1024) /* the server's own limit, proto-max-bulk-len */
#define RESP_MAX_ARRAY (1LL << 20)

typedef enum {
    RESP_MORE,     /* no complete event in the bytes given: come back with more */
    RESP_ARRAY,    /* integer = number of elements that follow */
    RESP_BULK,     /* integer = length of the content that follows as RESP_DATA, then RESP_BULK_END */
    RESP_DATA,     /* data, length = content that is there; consumed by resp_take, in pieces as the caller likes */
    RESP_BULK_END, /* the bulk string is complete */
    RESP_NIL,      /* null bulk string or null array */
    RESP_STATUS,   /* data, length = the line */
    RESP_ERROR,    /* data, length = the line */
    RESP_INTEGER,  /* integer */
    RESP_INVALID   /* not RESP: the connection is of no further use */
} resp_event;

typedef struct {
    const char *data;
    size_t length;
    int64_t integer;
    int depth; /* 0 for a reply itself, 1 for an element of it, ... */
    int last;  /* with this event the whole reply is complete */
} resp_item;

typedef struct {
    int64_t bulk_remaining; /* bytes of content still to come; -1 outside a bulk string */
    int depth;
    int64_t remaining[RESP_MAX_DEPTH]; /* elements still to come, for each open array */
} resp_decoder;

void resp_reset(resp_decoder *decoder);

/* Take the next event from `bytes`; `*consumed` says how many bytes it used up (0 for RESP_DATA: see resp_take). */
resp_event resp_next(resp_decoder *decoder, const char *bytes, size_t length, size_t *consumed, resp_item *item);

/* After RESP_DATA: the caller has used `count` (<= item.length) bytes of content. */
void resp_take(resp_decoder *decoder, size_t count);

/* Decimal digits of `number`, not terminated; returns how many. Keys and headers are made by the thousand. */
size_t resp_decimal(char digits[20], uint64_t number);

/* A growable byte buffer. `failed` is set when memory ran out; appending then does nothing. */
typedef struct {
    char *data;
    size_t length, capacity;
    int failed;
} resp_buffer;

void resp_buffer_free(resp_buffer *buffer);
void resp_buffer_clear(resp_buffer *buffer);
void resp_append(resp_buffer *buffer, const void *bytes, size_t length);
void resp_append_array(resp_buffer *buffer, size_t elements);                 /* *N\r\n */
void resp_append_bulk_header(resp_buffer *buffer, size_t length);             /* $N\r\n */
void resp_append_bulk(resp_buffer *buffer, const void *bytes, size_t length); /* $N\r\n...\r\n */
void resp_append_text(resp_buffer *buffer, const char *text);                 /* a bulk string from a C string */
void resp_append_number(resp_buffer *buffer, int64_t number);                 /* a bulk string from a number */

#endif

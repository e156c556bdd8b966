#include "resp.h"

#include <stdlib.h>
#include <string.h>

void resp_reset(resp_decoder *decoder) {
    decoder->bulk_remaining = -1;
    decoder->depth = 0;
}

/* A complete element was seen: close every array that it completes. Returns 1 when the whole reply is complete. */
static int element_done(resp_decoder *decoder) {
    while (decoder->depth > 0) {
        if (--decoder->remaining[decoder->depth - 1] > 0) return 0;
        decoder->depth--;
    }
    return 1;
}

/* A decimal number with optional minus sign and nothing else; 0 when it is not one or does not fit. */
static int parse_integer(const char *text, size_t length, int64_t *value) {
    int negative = length > 0 && text[0] == '-';
    size_t i = negative ? 1 : 0;
    if (i == length || length - i > 19) return 0;
    uint64_t number = 0;
    for (; i < length; i++) {
        if (text[i] < '0' || text[i] > '9') return 0;
        number = number * 10 + (uint64_t)(text[i] - '0'); /* at most 19 digits: below 2^64 */
    }
    if (number > (uint64_t)INT64_MAX + (negative ? 1 : 0)) return 0;
    *value = negative ? (int64_t)(0 - number) : (int64_t)number;
    return 1;
}

static resp_event begin_array(resp_decoder *decoder, resp_item *item) {
    if (item->integer == -1) {
        item->last = element_done(decoder);
        return RESP_NIL;
    }
    if (item->integer < 0 || item->integer > RESP_MAX_ARRAY) return RESP_INVALID;
    if (item->integer == 0) {
        item->last = element_done(decoder);
        return RESP_ARRAY;
    }
    if (decoder->depth == RESP_MAX_DEPTH) return RESP_INVALID;
    decoder->remaining[decoder->depth++] = item->integer;
    return RESP_ARRAY;
}

static resp_event begin_bulk(resp_decoder *decoder, resp_item *item) {
    if (item->integer == -1) {
        item->last = element_done(decoder);
        return RESP_NIL;
    }
    if (item->integer < 0 || item->integer > RESP_MAX_BULK) return RESP_INVALID;
    decoder->bulk_remaining = item->integer;
    return RESP_BULK;
}

static resp_event in_bulk(resp_decoder *decoder, const char *bytes, size_t length, size_t *consumed, resp_item *item) {
    if (decoder->bulk_remaining > 0) {
        if (length == 0) return RESP_MORE;
        item->data = bytes;
        item->length = (int64_t)length < decoder->bulk_remaining ? length : (size_t)decoder->bulk_remaining;
        return RESP_DATA;
    }
    if (length < 2) return RESP_MORE;
    if (bytes[0] != '\r' || bytes[1] != '\n') return RESP_INVALID;
    *consumed = 2;
    decoder->bulk_remaining = -1;
    item->last = element_done(decoder);
    return RESP_BULK_END;
}

resp_event resp_next(resp_decoder *decoder, const char *bytes, size_t length, size_t *consumed, resp_item *item) {
    *consumed = 0;
    *item = (resp_item){.depth = decoder->depth};
    if (decoder->bulk_remaining >= 0) return in_bulk(decoder, bytes, length, consumed, item);
    if (length == 0) return RESP_MORE;
    if (!memchr("+-:$*", bytes[0], 5)) return RESP_INVALID; /* refuse at the first byte, before waiting for a line */
    const char *newline = memchr(bytes, '\n', length < RESP_MAX_LINE ? length : RESP_MAX_LINE);
    if (!newline) return length >= RESP_MAX_LINE ? RESP_INVALID : RESP_MORE;
    if (newline - bytes < 2 || newline[-1] != '\r') return RESP_INVALID;
    *consumed = (size_t)(newline - bytes) + 1;
    item->data = bytes + 1;
    item->length = *consumed - 3;
    if (bytes[0] == '+' || bytes[0] == '-') {
        item->last = element_done(decoder);
        return bytes[0] == '+' ? RESP_STATUS : RESP_ERROR;
    }
    if (!parse_integer(item->data, item->length, &item->integer)) return RESP_INVALID;
    if (bytes[0] == '*') return begin_array(decoder, item);
    if (bytes[0] == '$') return begin_bulk(decoder, item);
    item->last = element_done(decoder);
    return RESP_INTEGER;
}

void resp_take(resp_decoder *decoder, size_t count) { decoder->bulk_remaining -= (int64_t)count; }

void resp_buffer_free(resp_buffer *buffer) {
    free(buffer->data);
    *buffer = (resp_buffer){0};
}

void resp_buffer_clear(resp_buffer *buffer) {
    buffer->length = 0;
    buffer->failed = 0;
}

void resp_append(resp_buffer *buffer, const void *bytes, size_t length) {
    if (buffer->failed || length == 0) return;
    if (buffer->capacity - buffer->length < length) {
        size_t capacity = buffer->capacity ? buffer->capacity : 256;
        while (capacity - buffer->length < length) {
            if (capacity > SIZE_MAX / 2) {
                buffer->failed = 1;
                return;
            }
            capacity *= 2;
        }
        char *data = realloc(buffer->data, capacity);
        if (!data) {
            buffer->failed = 1;
            return;
        }
        buffer->data = data;
        buffer->capacity = capacity;
    }
    memcpy(buffer->data + buffer->length, bytes, length);
    buffer->length += length;
}

size_t resp_decimal(char digits[20], uint64_t number) {
    char reversed[20];
    size_t count = 0;
    do reversed[count++] = (char)('0' + number % 10);
    while (number /= 10);
    for (size_t i = 0; i < count; i++) digits[i] = reversed[count - 1 - i];
    return count;
}

static void append_header(resp_buffer *buffer, char type, uint64_t number) {
    char line[24] = {type};
    size_t length = 1 + resp_decimal(line + 1, number);
    line[length] = '\r';
    line[length + 1] = '\n';
    resp_append(buffer, line, length + 2);
}

void resp_append_array(resp_buffer *buffer, size_t elements) { append_header(buffer, '*', elements); }

void resp_append_bulk_header(resp_buffer *buffer, size_t length) { append_header(buffer, '$', length); }

void resp_append_bulk(resp_buffer *buffer, const void *bytes, size_t length) {
    resp_append_bulk_header(buffer, length);
    resp_append(buffer, bytes, length);
    resp_append(buffer, "\r\n", 2);
}

void resp_append_text(resp_buffer *buffer, const char *text) { resp_append_bulk(buffer, text, strlen(text)); }

void resp_append_number(resp_buffer *buffer, int64_t number) {
    char text[24] = {'-'};
    size_t sign = number < 0;
    resp_append_bulk(buffer, text, sign + resp_decimal(text + sign, sign ? 0 - (uint64_t)number : (uint64_t)number));
}

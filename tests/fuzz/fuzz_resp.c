/* The decoder of the Redis protocol: any bytes, whole or in pieces, give the same events, and no event points outside.
 *
 * Input: how many bytes come at a time (0: all), then the bytes.
 */
#include <stdlib.h>
#include <string.h>

#include "resp.h"

typedef struct {
    uint64_t digest; /* of all events; of content byte by byte, however it was cut */
    size_t events;
    int invalid;
} summary;

static void add(summary *s, uint64_t value) { s->digest = (s->digest ^ value) * 0x100000001b3; }

static summary decode(const uint8_t *data, size_t size, size_t piece) {
    resp_decoder decoder;
    summary s = {0xcbf29ce484222325, 0, 0};
    char *input = malloc(size + 1);
    size_t start = 0, end = 0, given = 0;
    if (!input) abort();
    resp_reset(&decoder);
    for (;;) {
        resp_item item;
        size_t consumed;
        resp_event event = resp_next(&decoder, input + start, end - start, &consumed, &item);
        if (event == RESP_MORE) {
            if (given == size) break;
            size_t count = piece && piece < size - given ? piece : size - given;
            memcpy(input + end, data + given, count);
            given += count;
            end += count;
            continue;
        }
        if (event == RESP_INVALID) {
            s.invalid = 1;
            break;
        }
        if (consumed > end - start) abort();
        start += consumed;
        if (event == RESP_DATA) {
            if (item.length == 0 || item.length > end - start || item.data != input + start) abort();
            for (size_t i = 0; i < item.length; i++) add(&s, (uint8_t)item.data[i]);
            resp_take(&decoder, item.length);
            start += item.length;
            continue;
        }
        s.events++;
        add(&s, (uint64_t)event);
        add(&s, (uint64_t)item.depth);
        add(&s, (uint64_t)item.last);
        if (event == RESP_ARRAY || event == RESP_BULK || event == RESP_INTEGER) add(&s, (uint64_t)item.integer);
        if (event == RESP_STATUS || event == RESP_ERROR)
            for (size_t i = 0; i < item.length; i++) add(&s, (uint8_t)item.data[i]);
    }
    free(input);
    return s;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    summary whole = decode(data + 1, size - 1, 0), cut = decode(data + 1, size - 1, data[0]);
    if (whole.events != cut.events || whole.digest != cut.digest || whole.invalid != cut.invalid) abort();
    return 0;
}

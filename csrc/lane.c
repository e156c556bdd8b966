#include "lane.h"

#include <stdlib.h>
#include <string.h>

static void message_free(smlt_message *message) {
    resp_buffer_free(&message->head);
    resp_buffer_free(&message->tail);
    free(message->payload);
    free(message);
}

void smlt_pool_free(smlt_message_pool *pool) {
    smlt_message *lists[] = {pool->free_bulk, pool->free_text};
    for (int i = 0; i < 2; i++)
        while (lists[i]) {
            smlt_message *next = lists[i]->next;
            message_free(lists[i]);
            lists[i] = next;
        }
    *pool = (smlt_message_pool){0};
}

void smlt_pool_unreserve_all(smlt_message_pool *pool) { memcpy(pool->available, pool->share, sizeof pool->share); }

int smlt_pool_init(smlt_message_pool *pool, const int share[SMLT_PURPOSES], size_t payload_capacity) {
    *pool = (smlt_message_pool){0};
    int bulk_messages = 0;
    for (int purpose = 0; purpose < SMLT_PURPOSES; purpose++) bulk_messages += pool->share[purpose] = share[purpose];
    smlt_pool_unreserve_all(pool);
    for (int i = 0; i < bulk_messages; i++) {
        smlt_message *message = calloc(1, sizeof *message);
        if (message) message->payload = malloc(payload_capacity);
        if (!message || !message->payload) {
            free(message);
            smlt_pool_free(pool);
            return 0;
        }
        message->next = pool->free_bulk;
        pool->free_bulk = message;
    }
    return 1;
}

smlt_message *smlt_pool_take_text(smlt_message_pool *pool) {
    smlt_message *message = pool->free_text;
    if (!message) return calloc(1, sizeof *message);
    pool->free_text = message->next;
    message->next = NULL;
    return message;
}

int smlt_pool_reserve(smlt_message_pool *pool, int purpose) {
    if (pool->available[purpose] == 0) return 0;
    pool->available[purpose]--;
    return 1;
}

void smlt_pool_unreserve(smlt_message_pool *pool, int purpose) { pool->available[purpose]++; }

smlt_message *smlt_pool_take_bulk(smlt_message_pool *pool, int purpose) {
    smlt_message *message = pool->free_bulk; /* there is one: it was reserved */
    pool->free_bulk = message->next;
    message->next = NULL;
    message->purpose = purpose;
    return message;
}

void smlt_pool_give(smlt_message_pool *pool, smlt_message *message) {
    resp_buffer_clear(&message->head);
    resp_buffer_clear(&message->tail);
    message->payload_length = message->sent = 0;
    smlt_message **list = message->payload ? &pool->free_bulk : &pool->free_text;
    if (message->payload) pool->available[message->purpose]++;
    message->next = *list;
    *list = message;
}

int smlt_lane_init(smlt_lane *lane, size_t input_capacity) {
    *lane = (smlt_lane){.input_capacity = input_capacity};
    resp_reset(&lane->decoder);
    lane->input = malloc(input_capacity);
    return lane->input != NULL;
}

void smlt_lane_reset(smlt_lane *lane, smlt_message_pool *pool) {
    while (lane->head) {
        smlt_message *next = lane->head->next;
        smlt_pool_give(pool, lane->head);
        lane->head = next;
    }
    lane->tail = NULL;
    lane->queued_bytes = 0;
    lane->expected_first = lane->expected_count = 0;
    lane->input_start = lane->input_end = 0;
    resp_reset(&lane->decoder);
}

void smlt_lane_free(smlt_lane *lane, smlt_message_pool *pool) {
    smlt_lane_reset(lane, pool);
    free(lane->expected);
    free(lane->input);
}

static size_t message_length(const smlt_message *message) {
    return message->head.length + message->payload_length + message->tail.length;
}

void smlt_lane_queue(smlt_lane *lane, smlt_message *message) {
    if (lane->tail)
        lane->tail->next = message;
    else
        lane->head = message;
    lane->tail = message;
    lane->queued_bytes += message_length(message);
}

int smlt_lane_expect(smlt_lane *lane, smlt_expectation expectation) {
    if (lane->expected_count == lane->expected_capacity) {
        size_t capacity = lane->expected_capacity ? 2 * lane->expected_capacity : 64;
        smlt_expectation *ring = malloc(capacity * sizeof *ring);
        if (!ring) return 0;
        for (size_t i = 0; i < lane->expected_count; i++)
            ring[i] = lane->expected[(lane->expected_first + i) % lane->expected_capacity];
        free(lane->expected);
        lane->expected = ring;
        lane->expected_capacity = capacity;
        lane->expected_first = 0;
    }
    lane->expected[(lane->expected_first + lane->expected_count++) % lane->expected_capacity] = expectation;
    return 1;
}

smlt_expectation *smlt_lane_expected(smlt_lane *lane) {
    return lane->expected_count ? &lane->expected[lane->expected_first] : NULL;
}

void smlt_lane_expected_done(smlt_lane *lane) {
    lane->expected_first = (lane->expected_first + 1) % lane->expected_capacity;
    lane->expected_count--;
}

void smlt_lane_is_alive(smlt_lane *lane, int64_t now_ms) {
    lane->moved_before = lane->moved;
    lane->still_since_ms = now_ms;
}

int64_t smlt_lane_still_ms(smlt_lane *lane, int64_t now_ms) {
    if (lane->moved != lane->moved_before || lane->expected_count == 0) smlt_lane_is_alive(lane, now_ms);
    return now_ms - lane->still_since_ms;
}

/* Append what of a part is not sent yet; `*skip` bytes of it and the parts before are. */
static int add_vector(struct iovec *vectors, int count, char *data, size_t length, size_t *skip) {
    if (*skip >= length) {
        *skip -= length;
        return count;
    }
    vectors[count] = (struct iovec){data + *skip, length - *skip};
    *skip = 0;
    return count + 1;
}

int smlt_lane_output(const smlt_lane *lane, struct iovec *vectors, int max) {
    int count = 0;
    for (smlt_message *message = lane->head; message && count + 3 <= max; message = message->next) {
        size_t skip = message->sent;
        count = add_vector(vectors, count, message->head.data, message->head.length, &skip);
        count = add_vector(vectors, count, message->payload, message->payload_length, &skip);
        count = add_vector(vectors, count, message->tail.data, message->tail.length, &skip);
    }
    return count;
}

void smlt_lane_sent(smlt_lane *lane, smlt_message_pool *pool, size_t bytes) {
    lane->queued_bytes -= bytes;
    lane->moved += bytes;
    while (bytes > 0) {
        smlt_message *message = lane->head;
        size_t left = message_length(message) - message->sent;
        if (bytes < left) {
            message->sent += bytes;
            return;
        }
        bytes -= left;
        lane->head = message->next;
        if (!lane->head) lane->tail = NULL;
        smlt_pool_give(pool, message);
    }
}

char *smlt_lane_room(smlt_lane *lane, size_t *capacity) {
    *capacity = lane->input_capacity - lane->input_end;
    return lane->input + lane->input_end;
}

void smlt_lane_compact(smlt_lane *lane) {
    size_t left = lane->input_end - lane->input_start;
    if (left && lane->input_start) memmove(lane->input, lane->input + lane->input_start, left);
    lane->input_start = 0;
    lane->input_end = left;
}

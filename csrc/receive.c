/* What the store says to the collective. Nothing that came off the wire is trusted: every length, number and name is
 * checked against what was asked for before it is used. */
#include <stdio.h>
#include <string.h>

#include "collective.h"

static const char *const LANE_NAMES[] = {"up", "down", "tokens"};

static smlt_status not_as_asked(smlt_engine *engine, int lane, const char *what) {
    return smlt_fail_engine(engine, SMLT_PROTOCOL, "the store's reply on the %s connection is not as it must be: %s",
                            LANE_NAMES[lane], what);
}

static int starts_with(const resp_item *item, const char *text) {
    size_t length = strlen(text);
    return item->length >= length && memcmp(item->data, text, length) == 0;
}

/* What a store says while it starts, fails over, is busy or short of something: it passes. */
static const char *const REFUSALS[] = {"LOADING ",  "READONLY ", "BUSY ",       "MASTERDOWN ", "CLUSTERDOWN ",
                                       "TRYAGAIN ", "MISCONF ",  "NOREPLICAS ", "UNBLOCKED ",  "ERR max number of clients"};

static smlt_status kind_of_error(const resp_item *item) {
    if (starts_with(item, "OOM")) return SMLT_STORE_FULL;
    if (starts_with(item, "NOAUTH") || starts_with(item, "WRONGPASS") || starts_with(item, "NOPERM")) return SMLT_STORE_DENIED;
    for (size_t i = 0; i < sizeof REFUSALS / sizeof *REFUSALS; i++)
        if (starts_with(item, REFUSALS[i])) return SMLT_STORE_REFUSES;
    return SMLT_STORE_ERROR;
}

static smlt_status error_reply(smlt_engine *engine, const resp_item *item) {
    smlt_status status = kind_of_error(item);
    char text[901];
    size_t length = item->length < sizeof text - 1 ? item->length : sizeof text - 1;
    for (size_t i = 0; i < length; i++) text[i] = item->data[i] ? item->data[i] : '?';
    text[length] = 0;
    if (status != SMLT_STORE_FULL && status != SMLT_STORE_REFUSES)
        return smlt_fail_engine(engine, status, "%s", length ? text : "an error without a text");
    engine->refusal.status = status;
    strcpy(engine->refusal.message, text);
    return SMLT_STORE_REFUSES;
}

/* ---- the Shard Aggregator (contributions) and the Global Aggregator (aggregates): MGET on the DOWN lane, decoded as the
 * bytes come ---- */

/* Which chunk and which rank's bytes the current element of the reply is. */
static uint32_t element_chunk(const smlt_engine *engine, const collective *c, const smlt_expectation *expected) {
    return expected->kind == EXPECT_CONTRIBUTIONS ? expected->chunk
                                                  : c->aggregates.chunks[expected->first + engine->reading.element];
}

static int element_rank(const smlt_engine *engine, const collective *c, const smlt_expectation *expected) {
    if (expected->kind == EXPECT_AGGREGATES) return c->chunks[element_chunk(engine, c, expected)].owner;
    int element = (int)engine->reading.element;
    return element < engine->rank ? element : element + 1;
}

/* Contributions are added in rank order (invariant 1); this worker's own at its place among them. */
static void add_own(smlt_engine *engine, collective *c, uint32_t chunk_index) {
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    const char *source = (const char *)typed->segment.source + (size_t)chunk->source * typed->kernel.element_bytes;
    typed->kernel.reduce_own(engine->accumulator, source, (size_t)chunk->count, 0, c->shift[chunk_index - c->own_first],
                             engine->rank == 0);
}

static smlt_status chunk_bulk_begins(smlt_engine *engine, collective *c, const smlt_expectation *expected,
                                     const resp_item *item) {
    engine->reading.header_seen = 0;
    engine->reading.elements_done = 0;
    if (!c) return SMLT_OK;
    uint32_t chunk = element_chunk(engine, c, expected);
    const typed_segment *typed = &c->segments[c->chunks[chunk].segment];
    if (item->integer != (int64_t)(SMLT_HEADER_BYTES + smlt_wire_size(&typed->kernel, (size_t)c->chunks[chunk].count)))
        return not_as_asked(engine, SMLT_LANE_DOWN, "a chunk of another length than planned");
    if (expected->kind == EXPECT_CONTRIBUTIONS && (int)engine->reading.element == engine->rank) add_own(engine, c, chunk);
    return SMLT_OK;
}

static smlt_status check_header(smlt_engine *engine, const collective *c, const smlt_expectation *expected, const char *bytes) {
    smlt_header *header = &engine->reading.header;
    uint32_t chunk = element_chunk(engine, c, expected);
    if (!smlt_header_parse(bytes, SMLT_HEADER_BYTES, header) || header->step != c->step || header->digest != c->digest ||
        header->chunk != chunk || header->elements != (uint64_t)c->chunks[chunk].count ||
        header->rank != element_rank(engine, c, expected))
        return not_as_asked(engine, SMLT_LANE_DOWN, "a chunk whose header is of another collective");
    engine->reading.header_seen = 1;
    return SMLT_OK;
}

/* Content of a chunk has arrived: use what is whole of it. `*taken` receives how many bytes that were. */
static smlt_status chunk_data(smlt_engine *engine, collective *c, const smlt_expectation *expected, const resp_item *item,
                              size_t *taken) {
    if (!c) {
        *taken = item->length; /* of a collective that has ended */
        return SMLT_OK;
    }
    const char *bytes = item->data;
    size_t length = item->length;
    if (!engine->reading.header_seen) {
        if (length < SMLT_HEADER_BYTES) return SMLT_OK;
        smlt_status status = check_header(engine, c, expected, bytes);
        if (status != SMLT_OK) return status;
        bytes += SMLT_HEADER_BYTES;
        length -= SMLT_HEADER_BYTES;
        *taken = SMLT_HEADER_BYTES;
    }
    uint32_t chunk_index = element_chunk(engine, c, expected);
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    size_t done = engine->reading.elements_done;
    size_t n = smlt_wire_elements(&typed->kernel, length, (size_t)chunk->count - done);
    if (n == 0) return SMLT_OK;
    int64_t began = smlt_trace_begin(&engine->trace);
    if (expected->kind == EXPECT_CONTRIBUTIONS) {
        int first = engine->rank != 0 && engine->reading.element == 0;
        typed->kernel.reduce(engine->accumulator + done * typed->kernel.accumulator_bytes, bytes, n,
                             engine->reading.header.exponent, c->shift[chunk_index - c->own_first], first);
    } else {
        char *target = (char *)typed->segment.target + ((size_t)chunk->target + done) * typed->kernel.element_bytes;
        typed->kernel.decode(target, bytes, n, engine->reading.header.exponent);
    }
    smlt_trace_end(&engine->trace, expected->kind == EXPECT_CONTRIBUTIONS ? SMLT_TRACE_ADD : SMLT_TRACE_DECODE, began, c->step,
                   chunk_index, n * typed->kernel.element_bytes);
    engine->reading.elements_done += (uint32_t)n;
    *taken += smlt_wire_size(&typed->kernel, n);
    return SMLT_OK;
}

/* 2^-shift for the second try: so many values of any size cannot overflow. */
uint8_t smlt_shift_for(int world_size) {
    uint8_t shift = 1;
    while ((1L << shift) < world_size) shift++;
    return shift;
}

static void contributions_complete(smlt_engine *engine, collective *c, uint32_t chunk_index) {
    const smlt_chunk *chunk = &c->chunks[chunk_index];
    const typed_segment *typed = &c->segments[chunk->segment];
    uint8_t *shift = &c->shift[chunk_index - c->own_first];
    if (engine->rank == engine->world_size - 1) add_own(engine, c, chunk_index);
    int not_finite = typed->kernel.finish(engine->accumulator, (size_t)chunk->count, engine->world_size, *shift);
    if (not_finite && *shift == 0) { /* rare: fetch again and add smaller, lest a sum overflow whose mean does not */
        *shift = smlt_shift_for(engine->world_size);
        smlt_pool_unreserve(&engine->pool, SMLT_FOR_AGGREGATES);
        c->chunk_state[chunk_index] = CHUNK_READY;
        c->contributions.chunks[--c->contributions.first] = chunk_index;
        return;
    }
    if (is_kept(chunk)) {
        smlt_pool_unreserve(&engine->pool, SMLT_FOR_AGGREGATES);
        smlt_keep(engine, c, chunk_index);
    } else {
        smlt_publish(engine, c, chunk_index, engine->accumulator, SMLT_CHOOSE_EXPONENT, SMLT_FOR_AGGREGATES);
    }
}

static smlt_status chunks_event(smlt_engine *engine, const smlt_expectation *expected, resp_event event, const resp_item *item,
                                size_t *taken) {
    collective *c = smlt_find(engine, expected->step);
    if (c && c->result.status != SMLT_ACTIVE) c = NULL; /* it has ended: read past the reply */
    if (event == RESP_ARRAY && item->depth == 0 && item->integer == expected->count) {
        engine->reading.element = 0;
        engine->reading.incomplete = 0;
    } else if (event == RESP_BULK && item->depth == 1) {
        return chunk_bulk_begins(engine, c, expected, item);
    } else if (event == RESP_DATA) {
        return chunk_data(engine, c, expected, item, taken);
    } else if (event == RESP_NIL && item->depth == 1) {
        if (c) smlt_chunk_is_not_there(engine, c, element_chunk(engine, c, expected), element_rank(engine, c, expected));
        engine->reading.incomplete = 1;
        engine->reading.element++;
    } else if (event == RESP_BULK_END) {
        if (c && expected->kind == EXPECT_AGGREGATES) smlt_chunk_complete(engine, c, element_chunk(engine, c, expected));
        engine->reading.element++;
    } else {
        return not_as_asked(engine, SMLT_LANE_DOWN, "not the chunks that were asked for");
    }
    if (item->last) {
        engine->fetch_outstanding -= expected->bytes;
        engine->fetched_bytes += expected->bytes;
    }
    if (item->last && expected->kind == EXPECT_CONTRIBUTIONS) {
        if (c && !engine->reading.incomplete) {
            contributions_complete(engine, c, expected->chunk);
        } else {
            smlt_pool_unreserve(&engine->pool, SMLT_FOR_AGGREGATES);
            if (c) smlt_contributions_incomplete(engine, c, expected->chunk);
        }
    }
    return SMLT_OK;
}

/* ---- tokens: XREAD on the TOKENS lane ---- */

static smlt_status control_event(smlt_engine *engine, const char *text, size_t length) {
    const char *kind = engine->tokens.control_kind;
    if (strcmp(kind, "abort") == 0)
        return smlt_fail_engine(engine, SMLT_ABORTED, "%.*s", (int)(length < 1000 ? length : 1000), text);
    if (strcmp(kind, "generation") == 0) {
        uint64_t generation = 0;
        for (size_t i = 0; i < length && text[i] >= '0' && text[i] <= '9' && generation < UINT64_MAX / 16; i++)
            generation = generation * 10 + (uint64_t)(text[i] - '0');
        smlt_engine_fence(engine, generation);
    }
    return SMLT_OK;
}

static void copy_text(char *target, size_t capacity, const char *text, size_t length) {
    if (length >= capacity) length = capacity - 1;
    memcpy(target, text, length);
    target[length] = 0;
}

static smlt_status stream_value(smlt_engine *engine, const char *bytes, size_t length) {
    const char *field = engine->tokens.field;
    if (engine->tokens.stream == CONTROL) {
        if (strcmp(field, "kind") == 0)
            copy_text(engine->tokens.control_kind, sizeof engine->tokens.control_kind, bytes, length);
        return strcmp(field, "text") == 0 ? control_event(engine, bytes, length) : SMLT_OK;
    }
    smlt_token token;
    if (engine->tokens.stream == INBOX || engine->rank == 0) engine->token_bytes_since_trim += length;
    if (strcmp(field, "t") == 0) {
        engine->tokens.token_length = 0;
        if (!smlt_token_parse(bytes, length, &token)) return SMLT_OK; /* not one of ours: no hint */
        memcpy(engine->tokens.token, bytes, length);
        engine->tokens.token_length = length;
        /* Token and part are taken together: between the two reads of a split entry its collective may begin. */
        return token.kind == SMLT_TOKEN_PART ? SMLT_OK : smlt_take_token(engine, &token, bytes, length);
    }
    const char *before = engine->tokens.token;
    if (strcmp(field, "p") != 0 || !smlt_token_parse(before, engine->tokens.token_length, &token)) return SMLT_OK;
    if (token.kind != SMLT_TOKEN_PART) return SMLT_OK;
    smlt_status status = smlt_take_token(engine, &token, before, engine->tokens.token_length);
    return status != SMLT_OK ? status : smlt_take_part(engine, &token, before, engine->tokens.token_length, bytes, length);
}

/* Reply: [[stream, [[id, [field, value, ...]], ...]], ...]; the depth tells which string this is. */
static smlt_status stream_string(smlt_engine *engine, const resp_item *item) {
    if (item->depth == 2) {
        for (int i = 0; i < STREAMS; i++)
            if (item->length == strlen(engine->stream_key[i]) && memcmp(item->data, engine->stream_key[i], item->length) == 0) {
                engine->tokens.stream = i;
                engine->tokens.entry_seen = 0;
                return SMLT_OK;
            }
        return not_as_asked(engine, SMLT_LANE_TOKENS, "a stream that was not asked for");
    }
    if (item->depth == 4) {
        if (item->length >= sizeof engine->stream_id[0])
            return not_as_asked(engine, SMLT_LANE_TOKENS, "an entry's name is too long");
        engine->tokens.token_length = 0;
        strcpy(engine->before_id[engine->tokens.stream], engine->stream_id[engine->tokens.stream]);
        copy_text(engine->stream_id[engine->tokens.stream], sizeof engine->stream_id[0], item->data, item->length);
        engine->tokens.is_value = 0;
        engine->tokens.entry_seen = 1;
        return SMLT_OK;
    }
    if (item->depth != 5) return not_as_asked(engine, SMLT_LANE_TOKENS, "not the entries of a stream");
    int is_value = engine->tokens.is_value;
    engine->tokens.is_value = !is_value;
    if (is_value) return stream_value(engine, item->data, item->length);
    copy_text(engine->tokens.field, sizeof engine->tokens.field, item->data, item->length);
    return SMLT_OK;
}

#define STREAM_VALUE_MAX (SMLT_ONE_SHOT_BYTES_MAX + 4 * SMLT_TOKEN_MAX)

static smlt_status tokens_event(smlt_engine *engine, resp_event event, const resp_item *item, const resp_decoder *decoder,
                                size_t *taken) {
    smlt_status status = SMLT_OK;
    if (event == RESP_DATA) {
        if ((int64_t)item->length < decoder->bulk_remaining) return SMLT_OK; /* come back when it is whole */
        *taken = item->length;
        status = stream_string(engine, item);
    } else if (event == RESP_BULK) {
        if (item->integer > STREAM_VALUE_MAX || item->depth < 2) status = not_as_asked(engine, SMLT_LANE_TOKENS, "not a token");
    } else if (event != RESP_ARRAY && event != RESP_BULK_END && event != RESP_NIL) {
        status = not_as_asked(engine, SMLT_LANE_TOKENS, "not the entries of a stream");
    }
    if (item->last) engine->waiting_for_tokens = engine->tokens.entry_seen = 0;
    return status;
}

/* ---- confirmations: UP, and EXISTS on DOWN ---- */

static void contribution_stored(smlt_engine *engine, const smlt_expectation *expected) {
    collective *c = smlt_find(engine, expected->step);
    if (!c || c->upload_state[expected->first] == UPLOAD_STORED) return;
    c->upload_state[expected->first] = UPLOAD_STORED;
    c->uploads_left--;
    smlt_end_if_complete(engine, c);
}

static void aggregate_stored(smlt_engine *engine, const smlt_expectation *expected) {
    collective *c = smlt_find(engine, expected->step);
    if (!c || c->result.status != SMLT_ACTIVE) return;
    if (c->algorithm == SMLT_HIERARCHICAL) {
        smlt_delete_contributions(engine, c, expected->chunk);
    } else {
        uint8_t *state = &c->upload_state[expected->chunk - c->own_first];
        if (*state != UPLOAD_STORED) c->uploads_left--;
        *state = UPLOAD_STORED;
    }
    smlt_chunk_complete(engine, c, expected->chunk);
}

static void hello_stored(smlt_engine *engine, const smlt_expectation *expected) {
    collective *c = smlt_find(engine, expected->step);
    if (!c) return;
    c->hello_left = 0;
    smlt_end_if_complete(engine, c);
}

static void part_stored(smlt_engine *engine, const smlt_expectation *expected) {
    collective *c = smlt_find(engine, expected->step);
    if (!c) return;
    c->uploads_left = 0;
    smlt_end_if_complete(engine, c);
}

static smlt_status confirmation(smlt_engine *engine, int lane, const smlt_expectation *expected, resp_event event,
                                const resp_item *item, size_t *taken) {
    if (event == RESP_DATA) *taken = item->length; /* an XADD's entry name */
    if (!item->last) return event == RESP_ARRAY ? not_as_asked(engine, lane, "a list where a confirmation must be") : SMLT_OK;
    collective *c = smlt_find(engine, expected->step);
    switch (expected->kind) {
    case EXPECT_SET:
        if (event != RESP_STATUS) return not_as_asked(engine, lane, "a SET that was not confirmed");
        engine->upload_outstanding -= expected->bytes;
        return SMLT_OK;
    case EXPECT_CONTRIBUTION_STORED:
    case EXPECT_AGGREGATE_STORED:
    case EXPECT_HELLO_STORED:
    case EXPECT_PART_STORED:
        if (event != RESP_BULK_END) return not_as_asked(engine, lane, "an XADD that was not confirmed");
        if (expected->kind == EXPECT_CONTRIBUTION_STORED) contribution_stored(engine, expected);
        if (expected->kind == EXPECT_AGGREGATE_STORED) aggregate_stored(engine, expected);
        if (expected->kind == EXPECT_HELLO_STORED) hello_stored(engine, expected);
        if (expected->kind == EXPECT_PART_STORED) part_stored(engine, expected);
        return SMLT_OK;
    case EXPECT_CONTRIBUTION_EXISTS:
    case EXPECT_AGGREGATE_EXISTS:
        if (event != RESP_INTEGER) return not_as_asked(engine, lane, "no number where EXISTS was asked");
        if (item->integer != 1 || !c || c->result.status != SMLT_ACTIVE) return SMLT_OK;
        if (expected->kind == EXPECT_AGGREGATE_EXISTS)
            smlt_aggregate_is_there(c, expected->chunk);
        else
            smlt_contribution_is_there(engine, c, expected->chunk, (int)expected->first);
        return SMLT_OK;
    default: return SMLT_OK;
    }
}

/* ---- one lane's bytes ---- */

static smlt_status dispatch(smlt_engine *engine, int lane, resp_event event, const resp_item *item, size_t *taken) {
    smlt_expectation *expected = smlt_lane_expected(&engine->lanes[lane]);
    if (event == RESP_ERROR) return error_reply(engine, item);
    if (!expected) return not_as_asked(engine, lane, "a reply to no command");
    smlt_expectation what = *expected; /* handlers may add expectations and so move the ring */
    if (what.kind == EXPECT_TOKENS) return tokens_event(engine, event, item, &engine->lanes[lane].decoder, taken);
    if (what.kind == EXPECT_CONTRIBUTIONS || what.kind == EXPECT_AGGREGATES)
        return chunks_event(engine, &what, event, item, taken);
    return confirmation(engine, lane, &what, event, item, taken);
}

smlt_status smlt_decode(smlt_engine *engine, int lane_index) {
    smlt_lane *lane = &engine->lanes[lane_index];
    for (;;) {
        resp_item item;
        size_t consumed, taken = 0;
        resp_event event =
            resp_next(&lane->decoder, lane->input + lane->input_start, lane->input_end - lane->input_start, &consumed, &item);
        if (event == RESP_MORE) break;
        if (event == RESP_INVALID) return not_as_asked(engine, lane_index, "it is not the Redis protocol");
        smlt_status status = dispatch(engine, lane_index, event, &item, &taken);
        if (status != SMLT_OK) return status;
        if (item.last) smlt_lane_expected_done(lane);
        if (event == RESP_DATA) {
            if (taken == 0) break; /* less than an element, a header or a token */
            resp_take(&lane->decoder, taken);
        }
        lane->input_start += consumed + taken;
    }
    smlt_lane_compact(lane);
    return engine->fatal.status;
}

/* ---- what the transport drives ---- */

int smlt_engine_output(smlt_engine *engine, int lane, struct iovec *vectors, int max) {
    smlt_compose(engine, lane);
    return smlt_lane_output(&engine->lanes[lane], vectors, max);
}

void smlt_engine_sent(smlt_engine *engine, int lane, size_t bytes) {
    smlt_lane_sent(&engine->lanes[lane], &engine->pool, bytes);
}

char *smlt_engine_input(smlt_engine *engine, int lane, size_t *capacity) {
    return smlt_lane_room(&engine->lanes[lane], capacity);
}

smlt_status smlt_engine_received(smlt_engine *engine, int lane, size_t bytes) {
    if (engine->fatal.status != SMLT_OK) return engine->fatal.status;
    if (engine->refusal.status != SMLT_OK) return SMLT_STORE_REFUSES;
    engine->lanes[lane].input_end += bytes;
    engine->lanes[lane].moved += bytes;
    return smlt_decode(engine, lane);
}

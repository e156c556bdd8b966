/* After a lost connection: what was not confirmed is done again, and missing chunks are looked for by key (invariant 5). */
#include <stdio.h>
#include <string.h>

#include "collective.h"

static void ask(smlt_engine *engine, smlt_message *message, const char *key, size_t length, smlt_expectation expectation) {
    resp_append_array(&message->head, 2);
    resp_append_text(&message->head, "EXISTS");
    resp_append_bulk(&message->head, key, length);
    smlt_expect(engine, SMLT_LANE_DOWN, expectation);
}

void smlt_ask_existence(smlt_engine *engine, collective *c) {
    if (c->algorithm == SMLT_ONE_SHOT) return; /* its tokens are the data: they are read again */
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    char key[SMLT_KEY_MAX];
    for (uint32_t chunk = 0; chunk < c->chunk_count; chunk++) {
        if (c->chunk_state[chunk] != CHUNK_WAITING) continue;
        if (c->chunks[chunk].owner != engine->rank) {
            ask(engine, message, key, smlt_key_aggregate(key, engine->prefix, c->step, chunk),
                (smlt_expectation){.kind = EXPECT_AGGREGATE_EXISTS, .step = c->step, .chunk = chunk});
            continue;
        }
        const uint8_t *arrived = c->arrived + (size_t)(chunk - c->own_first) * (size_t)engine->world_size;
        for (int rank = 0; c->algorithm == SMLT_HIERARCHICAL && rank < engine->world_size; rank++)
            if (rank != engine->rank && !arrived[rank])
                ask(engine, message, key, smlt_key_contribution(key, engine->prefix, c->step, chunk, rank),
                    (smlt_expectation){
                        .kind = EXPECT_CONTRIBUTION_EXISTS, .step = c->step, .chunk = chunk, .first = (uint32_t)rank});
    }
    smlt_queue(engine, SMLT_LANE_DOWN, message);
}

static void recover(smlt_engine *engine, collective *c) {
    c->recovered = 1;
    c->hello_unsent = c->hello_left;
    if (c->algorithm == SMLT_ONE_SHOT) { /* reading goes on where it was: no token is lost */
        c->parts.unsent = c->uploads_left > 0;
        return;
    }
    c->upload_next = 0;
    for (uint32_t i = 0; i < c->upload_count; i++) {
        uint8_t *state = &c->upload_state[i];
        if (*state == UPLOAD_SENT) *state = UPLOAD_UNSENT;
    }
    c->vanished.aggregates = c->vanished.contributions = 0;
    c->contributions = (fetch_queue){c->contributions.chunks, 0, 0};
    c->aggregates = (fetch_queue){c->aggregates.chunks, 0, 0};
    c->republish = (fetch_queue){c->republish.chunks, 0, 0};
    for (uint32_t chunk = 0; chunk < c->chunk_count; chunk++) {
        int own = chunk >= c->own_first && chunk < c->own_end;
        if (c->algorithm == SMLT_HIERARCHICAL && c->chunk_state[chunk] == CHUNK_PUBLISHED)
            c->republish.chunks[c->republish.count++] = chunk;
        if (c->chunk_state[chunk] == CHUNK_READY || c->chunk_state[chunk] == CHUNK_REQUESTED)
            smlt_queue_fetch(own ? &c->contributions : &c->aggregates, c, chunk);
    }
    smlt_ask_existence(engine, c);
}

/* ---- a chunk that was announced and is not there: its SET was refused, its token was not; or it was evicted ---- */

/* Wait for it again; so often as there is room in the queues. */
static void wait_again(smlt_engine *engine, collective *c, uint32_t chunk) {
    int is_aggregate = c->chunks[chunk].owner != engine->rank;
    uint32_t *times = is_aggregate ? &c->vanished.aggregates : &c->vanished.contributions;
    c->chunk_state[chunk] = CHUNK_WAITING;
    c->tokens_left++;
    smlt_error error;
    if (++*times > (is_aggregate ? c->chunk_count : c->own_end - c->own_first) + REFETCHES &&
        smlt_has_vanished(engine, c, 0, &error))
        smlt_end_collective(engine, c, error.status, error.message, strlen(error.message));
}

/* The sender sends both again, perhaps it has done so already: look once more, then wait for the token. */
void smlt_chunk_is_not_there(smlt_engine *engine, collective *c, uint32_t chunk, int rank) {
    int is_aggregate = c->chunks[chunk].owner != engine->rank;
    c->vanished.since_ms = smlt_clock_ms();
    c->vanished.chunk = chunk;
    c->vanished.rank = rank;
    c->recovered = 1;
    smlt_message *message = smlt_new_text(engine);
    if (!message) return;
    char key[SMLT_KEY_MAX];
    if (is_aggregate) {
        ask(engine, message, key, smlt_key_aggregate(key, engine->prefix, c->step, chunk),
            (smlt_expectation){.kind = EXPECT_AGGREGATE_EXISTS, .step = c->step, .chunk = chunk});
        wait_again(engine, c, chunk);
    } else {
        uint32_t own = chunk - c->own_first;
        c->arrived[(size_t)own * (size_t)engine->world_size + (size_t)rank] = 0;
        c->arrived_count[own]--;
        ask(engine, message, key, smlt_key_contribution(key, engine->prefix, c->step, chunk, rank),
            (smlt_expectation){.kind = EXPECT_CONTRIBUTION_EXISTS, .step = c->step, .chunk = chunk, .first = (uint32_t)rank});
    }
    smlt_queue(engine, SMLT_LANE_DOWN, message);
}

/* The MGET is over, and not all were there. By now they may have been announced again. */
void smlt_contributions_incomplete(smlt_engine *engine, collective *c, uint32_t chunk) {
    wait_again(engine, c, chunk);
    if (c->result.status == SMLT_ACTIVE && c->arrived_count[chunk - c->own_first] == others(engine))
        smlt_queue_fetch(&c->contributions, c, chunk);
}

int smlt_has_vanished(const smlt_engine *engine, const collective *c, int64_t for_ms, smlt_error *error) {
    if (!c->vanished.since_ms || c->chunk_state[c->vanished.chunk] != CHUNK_WAITING) return 0;
    if (smlt_clock_ms() - c->vanished.since_ms < for_ms) return 0;
    char key[SMLT_KEY_MAX];
    if (c->chunks[c->vanished.chunk].owner != engine->rank)
        smlt_key_aggregate(key, engine->prefix, c->step, c->vanished.chunk);
    else
        smlt_key_contribution(key, engine->prefix, c->step, c->vanished.chunk, c->vanished.rank);
    error->status = SMLT_VANISHED;
    snprintf(error->message, sizeof error->message,
             "key %s was announced by rank %d and is gone: evicted, expired or flushed. The store must run with "
             "maxmemory-policy noeviction",
             key, c->vanished.rank);
    return 1;
}

int smlt_engine_vanished(smlt_engine *engine, uint64_t step, smlt_error *error) {
    const collective *c = smlt_find(engine, step);
    return c && c->result.status == SMLT_ACTIVE && smlt_has_vanished(engine, c, 0, error);
}

/* ---- a connection that is dead and does not say so ---- */

void smlt_engine_set_silence(smlt_engine *engine, int64_t silence_ms) { engine->silence_ms = silence_ms; }

int smlt_engine_is_silent(smlt_engine *engine, int64_t now_ms, const int *unsent) {
    int unattended = now_ms - engine->looked_at_ms > UNATTENDED_MS, silent = 0;
    engine->looked_at_ms = now_ms;
    for (int i = 0; i < SMLT_LANES; i++) {
        int draining = unsent && unsent[i] != engine->unsent[i]; /* a slow link takes what was sent long ago */
        if (unsent) engine->unsent[i] = unsent[i];
        if (unattended || draining) smlt_lane_is_alive(&engine->lanes[i], now_ms);
        silent |= smlt_lane_still_ms(&engine->lanes[i], now_ms) > engine->silence_ms;
    }
    return silent;
}

/* ---- a store that has lost what it held ---- */

static void start_waiting(collective *c, uint32_t chunk) {
    if (c->chunk_state[chunk] != CHUNK_WAITING) c->tokens_left++;
    c->chunk_state[chunk] = CHUNK_WAITING;
}

/* Contributions are uploaded again unless their chunk is known to be aggregated: then its owner has the result, and the
 * memory may hold it here too. Own results are published again from the target. */
static void lose_chunks(smlt_engine *engine, collective *c) {
    for (uint32_t i = 0; i < c->upload_count; i++) {
        if (c->upload_state[i] == UPLOAD_STORED && c->algorithm == SMLT_HIERARCHICAL && c->aggregated[c->uploads[i]]) continue;
        if (c->upload_state[i] == UPLOAD_STORED) c->uploads_left++;
        c->upload_state[i] = UPLOAD_UNSENT;
    }
    for (uint32_t chunk = 0; chunk < c->chunk_count; chunk++) {
        uint8_t *state = &c->chunk_state[chunk];
        int own = chunk >= c->own_first && chunk < c->own_end;
        if (own && *state == CHUNK_DONE && !is_kept(&c->chunks[chunk])) {
            *state = CHUNK_PUBLISHED;
            c->chunks_left++;
        }
        if (*state == CHUNK_READY || *state == CHUNK_REQUESTED) start_waiting(c, chunk);
        if (!own || c->algorithm != SMLT_HIERARCHICAL || *state == CHUNK_DONE) continue;
        memset(c->arrived + (size_t)(chunk - c->own_first) * (size_t)engine->world_size, 0, (size_t)engine->world_size);
        c->arrived_count[chunk - c->own_first] = 0;
    }
}

void smlt_engine_data_lost(smlt_engine *engine) {
    for (int i = 0; i < STREAMS; i++) {
        strcpy(engine->stream_id[i], "0-0");
        strcpy(engine->before_id[i], "0-0");
        engine->rewind_id[i][0] = 0;
    }
    engine->rewind = 0;
    engine->trim.newest = 0;
    memset(&engine->tokens, 0, sizeof engine->tokens);
    for (collective *c = engine->active; c; c = c->next) {
        if (c->result.status != SMLT_ACTIVE) continue;
        c->hello_left = c->algorithm == SMLT_COPY && engine->rank != 0;
        if (c->algorithm == SMLT_ONE_SHOT)
            c->uploads_left = 1;
        else
            lose_chunks(engine, c);
    }
}

/* ---- new connections ---- */

void smlt_engine_reconnected(smlt_engine *engine) {
    engine->refusal.status = SMLT_OK;
    engine->looked_at_ms = 0;
    if (engine->waiting_for_tokens && engine->tokens.entry_seen) /* it may have been cut off behind its name */
        strcpy(engine->stream_id[engine->tokens.stream], engine->before_id[engine->tokens.stream]);
    for (int lane = 0; lane < SMLT_LANES; lane++) smlt_lane_reset(&engine->lanes[lane], &engine->pool);
    smlt_pool_unreserve_all(&engine->pool); /* the replies will not come */
    engine->upload_outstanding = engine->fetch_outstanding = 0;
    engine->waiting_for_tokens = 0;
    memset(&engine->reading, 0, sizeof engine->reading);
    memset(&engine->tokens, 0, sizeof engine->tokens);
    memset(engine->expiry_set_ms, 0, ((size_t)engine->world_size + 1) * sizeof *engine->expiry_set_ms);
    for (collective *c = engine->active; c; c = c->next) {
        if (c->result.status == SMLT_ACTIVE)
            recover(engine, c);
        else if (c->result.status != SMLT_OK)
            smlt_delete_uploads(engine, c);
    }
}

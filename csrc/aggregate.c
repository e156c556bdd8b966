#include "collective.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int64_t smlt_clock_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* ---- the engine ---- */

static int init_node(smlt_engine *engine, smlt_node *node, const char *prefix, const char *control_key) {
    node->streams = control_key ? STREAMS : CONTROL;
    strcpy(node->prefix, prefix);
    smlt_key_inbox(node->stream_key[INBOX], prefix, engine->rank);
    smlt_key_outbox(node->stream_key[OUTBOX], prefix);
    if (control_key) strcpy(node->stream_key[CONTROL], control_key);
    for (int i = 0; i < STREAMS; i++) {
        strcpy(node->stream_id[i], "0-0");
        strcpy(node->before_id[i], "0-0");
    }
    node->expiry_set_ms = calloc((size_t)engine->world_size + 1, sizeof *node->expiry_set_ms);
    node->accumulator = malloc(engine->chunk_elements * 16); /* the widest: 128-bit sums of a mean of int64 */
    int complete = node->expiry_set_ms && node->accumulator;
    for (int kind = 0; kind < SMLT_LANE_KINDS; kind++) complete = smlt_lane_init(&node->lanes[kind], INPUT_BYTES) && complete;
    return complete;
}

static int allocate(smlt_engine *engine, const char *const *prefixes, const char *control_key) {
    int extra = (engine->node_count - 1) * BULK_FOR_EACH_NODE;
    int share[SMLT_PURPOSES] = {BULK_FOR_UPLOADS + extra, BULK_FOR_AGGREGATES + extra};
    engine->completed_by = calloc((size_t)engine->world_size, sizeof *engine->completed_by);
    engine->one_shot_accumulator = malloc(SMLT_ONE_SHOT_BYTES_MAX * 8); /* a mean of bytes is summed in 64 bits */
    engine->nodes = calloc((size_t)engine->node_count, sizeof *engine->nodes);
    if (!engine->nodes) return 0;
    int complete = engine->completed_by && engine->one_shot_accumulator &&
                   smlt_pool_init(&engine->pool, share, SMLT_HEADER_BYTES + engine->chunk_bytes);
    for (int node = 0; node < engine->node_count; node++) {
        engine->nodes[node].number = node;
        complete = init_node(engine, &engine->nodes[node], prefixes[node], node ? NULL : control_key) && complete;
    }
    return complete;
}

/* With several nodes, too, less than a window goes up; but more comes down, for they do not all have something at the same
 * time: half of one and a part from each, four in all (`python -m bench.store_nodes`). */
static void set_windows(smlt_engine *engine, size_t window_bytes) {
    size_t nodes = (size_t)engine->node_count, up = 6 * window_bytes / (10 * nodes);
    size_t down = window_bytes / 2 + window_bytes / nodes, most = 4 * window_bytes / nodes;
    if (nodes == 1) {
        engine->window_bytes = engine->upload_most = window_bytes;
        engine->upload_least = window_bytes / 4;
        return;
    }
    if (down > most) down = most;
    engine->window_bytes = down > NODE_WINDOW_BYTES ? down : NODE_WINDOW_BYTES;
    engine->upload_least = engine->upload_most = up > UPLOAD_QUEUE_BYTES ? up : UPLOAD_QUEUE_BYTES;
}

smlt_engine *smlt_engine_new(int rank, int world_size, uint64_t generation, int nodes, const char *const *prefixes,
                             const char *control_key, int64_t ttl_ms, size_t chunk_elements, size_t chunk_bytes,
                             size_t window_bytes, size_t store_window_bytes) {
    if (world_size < 2 || world_size > UINT16_MAX || rank < 0 || rank >= world_size) return NULL;
    if (nodes < 1 || nodes > SMLT_NODES_MAX || strlen(control_key) >= SMLT_KEY_MAX) return NULL;
    for (int node = 0; node < nodes; node++)
        if (strlen(prefixes[node]) > SMLT_PREFIX_MAX) return NULL;
    smlt_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return NULL;
    engine->rank = rank;
    engine->world_size = world_size;
    engine->generation = generation;
    engine->node_count = nodes;
    engine->ttl_ms = ttl_ms;
    engine->chunk_elements = chunk_elements;
    engine->chunk_bytes = chunk_bytes;
    set_windows(engine, window_bytes);
    engine->silence_ms = SILENCE_MS;
    if (allocate(engine, prefixes, control_key) && smlt_credit_init(engine, store_window_bytes)) return engine;
    smlt_engine_free(engine);
    return NULL;
}

void smlt_engine_free(smlt_engine *engine) {
    if (!engine) return;
    while (engine->active) {
        collective *next = engine->active->next;
        free(engine->active);
        engine->active = next;
    }
    free(engine->spare);
    for (int i = 0; engine->nodes && i < engine->node_count; i++) {
        smlt_node *node = &engine->nodes[i];
        for (int kind = 0; kind < SMLT_LANE_KINDS; kind++) smlt_lane_free(&node->lanes[kind], &engine->pool);
        free(node->expiry_set_ms);
        free(node->accumulator);
        smlt_credit_free(node);
    }
    free(engine->nodes);
    smlt_pool_free(&engine->pool);
    resp_buffer_free(&engine->early);
    free(engine->past);
    free(engine->completed_by);
    smlt_trace_free(&engine->trace);
    free(engine->one_shot_accumulator);
    free(engine);
}

smlt_status smlt_fail_engine(smlt_engine *engine, smlt_status status, const char *format, ...) {
    if (engine->fatal.status != SMLT_OK) return engine->fatal.status; /* the first failure is the one to report */
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(engine->fatal.message, sizeof engine->fatal.message, format, arguments);
    va_end(arguments);
    return engine->fatal.status = status;
}

size_t smlt_engine_requested(const smlt_engine *engine) {
    size_t bytes = 0;
    for (int node = 0; node < engine->node_count; node++) bytes += engine->nodes[node].fetch_outstanding;
    return bytes;
}

size_t smlt_engine_unconfirmed(const smlt_engine *engine) {
    size_t bytes = 0;
    for (int node = 0; node < engine->node_count; node++) bytes += engine->nodes[node].upload_outstanding;
    return bytes;
}

smlt_trace *smlt_engine_trace(smlt_engine *engine) { return &engine->trace; }

const smlt_error *smlt_engine_fatal(const smlt_engine *engine) { return &engine->fatal; }

const smlt_error *smlt_engine_refusal(const smlt_engine *engine) { return &engine->refusal; }

void smlt_engine_give_up(smlt_engine *engine) {
    if (engine->fatal.status == SMLT_OK) engine->fatal = engine->refusal;
}

/* ---- beginning a collective ---- */

/* Tokens, and one-shot parts, that came before their collective was begun here. */
static smlt_status replay_early_tokens(smlt_engine *engine) {
    resp_buffer *early = &engine->early;
    smlt_status status = SMLT_OK;
    int all_taken = 1;
    for (size_t at = engine->early_first; at < early->length && status == SMLT_OK;) {
        early_token kept;
        memcpy(&kept, early->data + at, sizeof kept);
        char *bytes = early->data + at + sizeof kept;
        if (kept.step && kept.step <= engine->last_step) {
            smlt_token token;
            kept.step = 0;
            memcpy(early->data + at, &kept, sizeof kept);
            if (smlt_token_parse(bytes, kept.length, &token)) {
                smlt_node *node = &engine->nodes[kept.node];
                status = smlt_take_token(engine, node, &token, bytes, kept.length);
                if (token.kind == SMLT_TOKEN_PART && status == SMLT_OK)
                    status = smlt_take_part(engine, node, &token, bytes, kept.length, bytes + kept.length, kept.part_length);
            }
        }
        at += sizeof kept + kept.length + kept.part_length;
        all_taken = all_taken && kept.step == 0;
        if (all_taken) engine->early_first = at;
    }
    if (engine->early_first > early->length / 2) {
        early->length -= engine->early_first;
        memmove(early->data, early->data + engine->early_first, early->length);
        engine->early_first = 0;
    }
    return status;
}

static int remember(smlt_engine *engine, const collective *c) {
    if (c->own_first == c->own_end || engine->credit) return 1; /* nothing to delete later, or credit.c does it */
    if (engine->past_first > 0 && engine->past_count == engine->past_capacity) {
        memmove(engine->past, engine->past + engine->past_first,
                (engine->past_count - engine->past_first) * sizeof *engine->past);
        engine->past_count -= engine->past_first;
        engine->past_first = 0;
    }
    if (engine->past_count == engine->past_capacity) {
        size_t capacity = engine->past_capacity ? 2 * engine->past_capacity : 16;
        remains *past = realloc(engine->past, capacity * sizeof *past);
        if (!past) return 0;
        engine->past = past;
        engine->past_capacity = capacity;
    }
    remains *entry = &engine->past[engine->past_count++];
    *entry = (remains){.step = c->step, .own_first = c->own_first, .own_end = c->own_end};
    return 1;
}

/* ---- the end of a collective ---- */

collective *smlt_find(smlt_engine *engine, uint64_t step) {
    for (collective *c = engine->active; c; c = c->next)
        if (c->step == step) return c;
    return NULL;
}

/* Everything below the oldest unfinished collective needs no more of the store. */
static void note_end(smlt_engine *engine, collective *c, smlt_status status) {
    c->result.status = status;
    engine->ends++;
    engine->failures += status != SMLT_OK;
    engine->completed = engine->last_step;
    for (const collective *other = engine->active; other; other = other->next)
        if (other->result.status == SMLT_ACTIVE) {
            engine->completed = other->step - 1;
            break;
        }
    engine->completed_by[engine->rank] = engine->completed;
    smlt_note_read_all(engine, c);
}

void smlt_end_if_complete(smlt_engine *engine, collective *c) {
    if (c->result.status == SMLT_ACTIVE && c->chunks_left == 0 && c->uploads_left == 0 && c->hello_left == 0 &&
        c->joined_left == 0)
        note_end(engine, c, SMLT_OK);
}

static void end_with(smlt_engine *engine, collective *c, smlt_status status, const char *message, size_t length) {
    if (c->result.status != SMLT_ACTIVE) return;
    note_end(engine, c, status);
    if (length >= sizeof c->result.message) length = sizeof c->result.message - 1;
    memcpy(c->result.message, message, length);
    c->result.message[length] = 0;
    smlt_delete_uploads(engine, c);
}

static void end_after_failure(smlt_engine *engine, collective *c) {
    char text[SMLT_MESSAGE_MAX];
    int length = snprintf(text, sizeof text, "collective %llu failed before it", (unsigned long long)engine->failed_step);
    end_with(engine, c, SMLT_ABORTED, text, (size_t)length);
}

/* Others will not come to what was called after a failed collective; after a mismatch all go on alike. */
void smlt_end_collective(smlt_engine *engine, collective *c, smlt_status status, const char *message, size_t length) {
    if (c->result.status != SMLT_ACTIVE) return;
    end_with(engine, c, status, message, length);
    if (status == SMLT_MISMATCH || status == SMLT_FENCED) return;
    if (!engine->failed_step) engine->failed_step = c->step;
    for (collective *later = c->next; later; later = later->next) end_after_failure(engine, later);
}

void smlt_chunk_complete(smlt_engine *engine, collective *c, uint32_t chunk) {
    if (c->chunk_state[chunk] != CHUNK_DONE) {
        c->chunk_state[chunk] = CHUNK_DONE;
        c->chunks_left--;
        smlt_note_read(engine, c, chunk);
    }
    smlt_end_if_complete(engine, c);
}

smlt_status smlt_engine_submit(smlt_engine *engine, const smlt_plan *plan, uint64_t *step) {
    if (engine->fatal.status != SMLT_OK) return engine->fatal.status;
    if (engine->fenced_by) return SMLT_FENCED;
    collective *c = smlt_collective_new(engine, plan), **last = &engine->active;
    if (!c) return SMLT_NO_MEMORY;
    if (!remember(engine, c)) {
        smlt_collective_free(engine, c);
        return SMLT_NO_MEMORY;
    }
    if (!smlt_engine_unfinished(engine)) engine->fetched_bytes = 0;
    while (*last) last = &(*last)->next;
    *last = c;
    *step = engine->last_step = c->step;
    if (engine->failed_step) end_after_failure(engine, c);
    for (int i = 0; i < engine->node_count; i++) {
        smlt_node *node = &engine->nodes[i];
        if (c->step > node->early_dropped) continue;
        node->rewind = 1;
        smlt_ask_existence(engine, node, c);
        if (node->waiting_for_tokens) smlt_end_wait(engine, node, c->step);
    }
    return replay_early_tokens(engine);
}

smlt_status smlt_engine_state(smlt_engine *engine, uint64_t step, smlt_error *error) {
    collective *c = smlt_find(engine, step);
    if (!c) {
        *error = (smlt_error){SMLT_PROTOCOL, "no such collective"};
        return SMLT_PROTOCOL;
    }
    *error = c->result.status == SMLT_ACTIVE && engine->fatal.status != SMLT_OK ? engine->fatal : c->result;
    if (error->status == SMLT_ACTIVE && smlt_has_vanished(engine, c, VANISHED_MS, error))
        smlt_end_collective(engine, c, error->status, error->message, strlen(error->message));
    if (error->status == SMLT_ACTIVE && smlt_is_frozen(engine)) smlt_fence_error(engine, error);
    return error->status;
}

int smlt_engine_has_ended(smlt_engine *engine, uint64_t step) {
    const collective *c = smlt_find(engine, step);
    return !c || c->result.status != SMLT_ACTIVE || engine->fatal.status != SMLT_OK || smlt_is_frozen(engine);
}

int smlt_engine_unfinished(const smlt_engine *engine) {
    return !smlt_is_frozen(engine) && smlt_engine_first_unfinished(engine) != 0;
}

uint64_t smlt_engine_ends(const smlt_engine *engine) { return engine->ends; }

/* If so, this worker has completed only when its contributions were read. */
static int everyone_reads(const collective *c) {
    for (uint32_t chunk = 0; chunk < c->chunk_count; chunk++)
        if (c->chunks[chunk].reader) return 0;
    return 1;
}

void smlt_engine_retire(smlt_engine *engine, uint64_t step) {
    for (collective **link = &engine->active; *link; link = &(*link)->next)
        if ((*link)->step == step) {
            collective *c = *link;
            *link = c->next;
            if (c->recovered) { /* keys that were written twice, or whose deletion was lost with the connection */
                if (everyone_reads(c) || c->result.status != SMLT_OK) smlt_delete_uploads(engine, c);
                for (uint32_t chunk = c->own_first; c->algorithm == SMLT_HIERARCHICAL && chunk < c->own_end; chunk++)
                    smlt_delete_contributions(engine, c, chunk);
            }
            smlt_collective_free(engine, c);
            break;
        }
}

void smlt_engine_abandon(smlt_engine *engine, uint64_t step, smlt_status status, const char *text, int announce) {
    collective *c = smlt_find(engine, step);
    if (!c || c->result.status != SMLT_ACTIVE) return;
    smlt_end_collective(engine, c, status, text, strlen(text));
    if (announce) smlt_announce(engine, step, SMLT_TOKEN_ABORT, status, text, strlen(text));
}

int smlt_engine_missing_owner(smlt_engine *engine, uint64_t step) {
    collective *c = smlt_find(engine, step);
    if (c && c->algorithm == SMLT_ONE_SHOT) {
        for (int rank = 0; rank < engine->world_size; rank++)
            if (rank != engine->rank && !c->parts.arrived[rank]) return rank;
        return -1;
    }
    for (uint32_t chunk = 0; c && chunk < c->chunk_count; chunk++)
        if (c->chunk_state[chunk] != CHUNK_DONE && c->chunks[chunk].owner != engine->rank) return c->chunks[chunk].owner;
    return -1;
}

int smlt_engine_has_joined(smlt_engine *engine, uint64_t step, int rank) {
    collective *c = smlt_find(engine, step);
    return c && rank >= 0 && rank < engine->world_size && c->joined[rank];
}

int smlt_engine_flushed(const smlt_engine *engine) {
    for (int node = 0; node < engine->node_count; node++) {
        const smlt_lane *up = &engine->nodes[node].lanes[SMLT_LANE_UP];
        if (up->head || up->expected_count) return 0;
    }
    return 1;
}

/* ---- tokens: hints of what has arrived; a lost, doubled or hostile one changes nothing (invariant 5) ---- */

void smlt_queue_fetch(chunk_queue *queue, collective *c, uint32_t chunk) {
    if (c->chunk_state[chunk] == CHUNK_WAITING) c->tokens_left--;
    c->chunk_state[chunk] = CHUNK_READY;
    queue->chunks[queue->count++] = chunk;
}

void smlt_contribution_is_there(smlt_engine *engine, collective *c, uint32_t chunk, int rank) {
    uint32_t own = chunk - c->own_first;
    uint8_t *arrived = &c->arrived[(size_t)own * (size_t)engine->world_size + (size_t)rank];
    if (*arrived) return;
    *arrived = 1;
    if (++c->arrived_count[own] == others(engine) && c->chunk_state[chunk] == CHUNK_WAITING)
        smlt_queue_fetch(&c->work[c->node[chunk]].contributions, c, chunk);
}

void smlt_aggregate_is_there(smlt_engine *engine, collective *c, uint32_t chunk) {
    if (engine->credit && c->algorithm == SMLT_HIERARCHICAL && c->chunks[chunk].reader == 0 && !c->aggregated[chunk] &&
        c->upload_state[chunk] != UPLOAD_UNSENT)
        smlt_contribution_consumed(chunk_node(engine, c, chunk), smlt_chunk_stored_bytes(c, chunk));
    c->aggregated[chunk] = 1;
    if (c->chunk_state[chunk] == CHUNK_WAITING) smlt_queue_fetch(&c->work[c->node[chunk]].aggregates, c, chunk);
}

static smlt_status check_caller(smlt_engine *engine, collective *c, const smlt_token *token) {
    if (engine->rank != 0 || c->joined[token->rank]) return SMLT_OK;
    if (token->digest == c->digest) {
        c->joined[token->rank] = 1;
        c->joined_left--;
        smlt_end_if_complete(engine, c);
        return SMLT_OK;
    }
    if (token->text_length == 0) return SMLT_OK; /* its first token, with the text, is still to come */
    char text[SMLT_MESSAGE_MAX];
    int length = snprintf(text, sizeof text, "rank %d called %.*s; rank 0 called %s", token->rank,
                          (int)(token->text_length < 480 ? token->text_length : 480), token->text, c->description);
    if (length >= SMLT_TOKEN_TEXT_MAX) length = SMLT_TOKEN_TEXT_MAX - 1;
    smlt_announce(engine, c->step, SMLT_TOKEN_ABORT, SMLT_MISMATCH, text, (size_t)length);
    smlt_end_collective(engine, c, SMLT_MISMATCH, text, (size_t)length);
    return SMLT_OK;
}

static void trim_if_read(smlt_engine *engine, smlt_node *node, uint64_t completed) {
    if (node->trim.newest && node->trim.newest <= completed) {
        smlt_trim_streams(engine, node);
        node->trim.newest = 0;
    }
    if (node->trim.newest || node->token_bytes_since_trim <= TRIM_BYTES) return;
    node->token_bytes_since_trim = 0;
    node->trim.newest = engine->newest_seen;
    strcpy(node->trim.inbox_id, node->stream_id[INBOX]);
    strcpy(node->trim.outbox_id, node->stream_id[OUTBOX]);
}

static void delete_what_everyone_has_read(smlt_engine *engine) {
    uint64_t completed = UINT64_MAX;
    for (int rank = 0; rank < engine->world_size; rank++)
        if (engine->completed_by[rank] < completed) completed = engine->completed_by[rank];
    while (engine->past_first < engine->past_count && engine->past[engine->past_first].step <= completed)
        smlt_delete_remains(engine, &engine->past[engine->past_first++]);
    for (int node = 0; node < engine->node_count; node++) {
        if (engine->credit) smlt_delete_read_aggregates(engine, &engine->nodes[node], completed);
        trim_if_read(engine, &engine->nodes[node], completed);
    }
}

static smlt_status keep_for_later(smlt_engine *engine, smlt_node *node, const smlt_token *token, const char *bytes,
                                  size_t length, const char *part, size_t part_length) {
    if (token->step > engine->last_step + AHEAD_MAX) return SMLT_OK;
    if (engine->early.length - engine->early_first + length + part_length > EARLY_BYTES_MAX) { /* read again in that step */
        int stream = node->tokens.stream;
        if (!node->rewind_id[stream][0]) strcpy(node->rewind_id[stream], node->before_id[stream]);
        if (token->step > node->early_dropped) node->early_dropped = token->step;
        return SMLT_OK;
    }
    early_token kept = {
        .step = token->step, .length = (uint32_t)length, .part_length = (uint32_t)part_length, .node = node->number};
    resp_append(&engine->early, &kept, sizeof kept);
    resp_append(&engine->early, bytes, length);
    resp_append(&engine->early, part, part_length);
    return engine->early.failed ? smlt_fail_engine(engine, SMLT_NO_MEMORY, "out of memory for arrival tokens") : SMLT_OK;
}

smlt_status smlt_take_part(smlt_engine *engine, smlt_node *node, const smlt_token *token, const char *bytes, size_t length,
                           const char *part, size_t part_length) {
    if (token->rank >= engine->world_size || token->rank == engine->rank) return SMLT_OK;
    if (token->step > engine->last_step) return keep_for_later(engine, node, token, bytes, length, part, part_length);
    collective *c = smlt_find(engine, token->step);
    if (c && c->result.status == SMLT_ACTIVE && c->algorithm == SMLT_ONE_SHOT && token->digest == c->digest)
        smlt_part_is_there(engine, c, token->rank, part, part_length);
    return SMLT_OK;
}

smlt_status smlt_take_token(smlt_engine *engine, smlt_node *node, const smlt_token *token, const char *bytes, size_t length) {
    if (token->rank >= engine->world_size || token->step > engine->last_step + AHEAD_MAX) return SMLT_OK;
    if (token->step > engine->newest_seen) engine->newest_seen = token->step;
    if (token->completed > engine->completed_by[token->rank] && token->rank != engine->rank) {
        engine->completed_by[token->rank] = token->completed;
        delete_what_everyone_has_read(engine);
    }
    if (token->kind >= SMLT_TOKEN_CONSUMED) {
        if (token->rank != engine->rank) smlt_take_word_of_credit(engine, node, token);
        return SMLT_OK;
    }
    if (token->step > engine->last_step)
        return token->kind == SMLT_TOKEN_PART ? SMLT_OK : keep_for_later(engine, node, token, bytes, length, NULL, 0);
    collective *c = smlt_find(engine, token->step);
    if (!c || c->result.status != SMLT_ACTIVE) return SMLT_OK;
    if (token->kind == SMLT_TOKEN_ABORT) {
        smlt_status status = token->status > SMLT_ACTIVE && token->status < SMLT_FENCED ? token->status : SMLT_ABORTED;
        smlt_error vanished;
        if (status != SMLT_MISMATCH && smlt_has_vanished(engine, c, 0, &vanished)) /* then that is why */
            smlt_end_collective(engine, c, vanished.status, vanished.message, strlen(vanished.message));
        smlt_end_collective(engine, c, status, token->text, token->text_length);
        return SMLT_OK;
    }
    if (token->rank == engine->rank) return SMLT_OK;
    smlt_status status = check_caller(engine, c, token);
    if (token->kind == SMLT_TOKEN_HELLO || token->digest != c->digest || token->chunk >= c->chunk_count) return status;
    int owner = c->chunks[token->chunk].owner;
    if (token->kind == SMLT_TOKEN_CONTRIBUTION && c->algorithm == SMLT_HIERARCHICAL && owner == engine->rank)
        smlt_contribution_is_there(engine, c, token->chunk, token->rank);
    else if (token->kind == SMLT_TOKEN_AGGREGATE && c->algorithm != SMLT_ONE_SHOT && owner == token->rank)
        smlt_aggregate_is_there(engine, c, token->chunk);
    return status;
}

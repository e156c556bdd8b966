/* A bound on what lies in the store (invariant 6): of each node's window every worker has its part, a third each for its
 * contributions, its aggregates, and what it has asked for (replies lie in the server's buffers).
 *
 *   contributions  count from their SET until the owner says that it has deleted them: by the aggregate's token, which in a
 *                  collective larger than its part comes behind the UNLINK; of a chunk for one reader by a token of its own.
 *   aggregates     count from the MGET of the contributions until their UNLINK. Past the half an owner asks, by a token
 *                  to everyone: tell me when you have read these. Who has, answers into its inbox.
 *
 * Nothing blocks for ever. Such a collective has its contributions sent in an order that is the same on all workers, so
 * the first chunk that is not aggregated is the next one that each of them may send. A later collective leaves room for the
 * largest aggregate that an earlier one has still to publish: not everyone may have come to the later one, and read what lies
 * there. Readers need no credit.
 */
#include <stdlib.h>
#include <string.h>

#include "collective.h"

#define PARTS 3
#define KEY_AND_OBJECT_BYTES 256

/* What a value takes in the server: jemalloc has four sizes between two powers of two. */
size_t smlt_stored_bytes(size_t bytes) {
    size_t step = 4;
    while (step < bytes / 8) step *= 2;
    return (bytes + step - 1) / step * step + KEY_AND_OBJECT_BYTES;
}

int smlt_credit_init(smlt_engine *engine, size_t store_window_bytes) {
    size_t ranks = (size_t)engine->world_size;
    if (!store_window_bytes) return 1;
    engine->credit = store_window_bytes / ranks / PARTS;
    for (int i = 0; i < engine->node_count; i++) {
        node_credit *credit = &engine->nodes[i].credit;
        credit->answered = calloc(ranks, sizeof *credit->answered);
        credit->asked = calloc(ranks, sizeof *credit->asked);
        if (!credit->answered || !credit->asked) return 0;
    }
    return 1;
}

void smlt_credit_free(smlt_node *node) {
    free(node->credit.answered);
    free(node->credit.asked);
    free(node->credit.published);
}

static int fits(const smlt_engine *engine, size_t live, size_t more) {
    return !engine->credit || live == 0 || live + more <= engine->credit;
}

/* Replies lie in the server's buffers. Valkey may refer there to the values themselves, and lets go of those that are sent only
 * when the buffer is empty: what was asked for since then counts. */
int smlt_may_fetch(const smlt_engine *engine, smlt_node *node, const collective *c, size_t bytes) {
    if (node->fetch_outstanding == 0) node->credit.asked_bytes = 0;
    return !c->bounded || fits(engine, node->credit.asked_bytes, bytes);
}

/* ---- contributions ---- */

size_t smlt_chunk_stored_bytes(const collective *c, uint32_t chunk) {
    const smlt_chunk *at = &c->chunks[chunk];
    return smlt_stored_bytes(SMLT_HEADER_BYTES + smlt_wire_size(&c->segments[at->segment].kernel, (size_t)at->count));
}

int smlt_may_upload(const smlt_engine *engine, const smlt_node *node, const collective *c, uint32_t chunk) {
    return fits(engine, node->credit.contributions, smlt_chunk_stored_bytes(c, chunk));
}

static void give_back(size_t *live, size_t bytes) { *live -= bytes < *live ? bytes : *live; }

void smlt_contribution_consumed(smlt_node *node, size_t bytes) { give_back(&node->credit.contributions, bytes); }

static int is_live(const collective *c, uint32_t chunk) {
    return c->algorithm == SMLT_HIERARCHICAL && (chunk < c->own_first || chunk >= c->own_end) && !c->aggregated[chunk] &&
           c->upload_state[chunk] != UPLOAD_UNSENT;
}

void smlt_uploads_deleted(smlt_engine *engine, const collective *c) {
    for (uint32_t chunk = 0; engine->credit && chunk < c->chunk_count; chunk++)
        if (is_live(c, chunk)) smlt_contribution_consumed(chunk_node(engine, c, chunk), smlt_chunk_stored_bytes(c, chunk));
}

/* ---- aggregates: the owner ---- */

/* What collectives before `c` may still need at once. */
static size_t room_for_earlier(const smlt_engine *engine, const smlt_node *node, const collective *c) {
    size_t room = 0;
    for (const collective *earlier = engine->active; earlier && earlier->step < c->step; earlier = earlier->next) {
        const node_work *work = &earlier->work[node->number];
        if (earlier->result.status == SMLT_ACTIVE && work->unpublished > 0 && work->largest_aggregate > room)
            room = work->largest_aggregate;
    }
    return room;
}

int smlt_reserve_aggregate(const smlt_engine *engine, smlt_node *node, const collective *c, uint32_t chunk) {
    if (!engine->credit) return 1;
    size_t bytes = smlt_chunk_stored_bytes(c, chunk), room = room_for_earlier(engine, node, c),
           *live = &node->credit.aggregates;
    if (room ? *live + bytes + room > engine->credit : !fits(engine, *live, bytes)) {
        node->credit.blocked = 1;
        return 0;
    }
    *live += bytes;
    return 1;
}

/* A chunk that its owner alone reads is never published. */
void smlt_count_aggregates(const smlt_engine *engine, collective *c) {
    for (uint32_t chunk = c->own_first; engine->credit && chunk < c->own_end; chunk++) {
        node_work *work = &c->work[c->node[chunk]];
        size_t bytes = smlt_chunk_stored_bytes(c, chunk);
        if (is_kept(&c->chunks[chunk])) continue;
        work->unpublished++;
        if (bytes > work->largest_aggregate) work->largest_aggregate = bytes;
    }
}

void smlt_unreserve_aggregate(const smlt_engine *engine, smlt_node *node, size_t bytes) {
    if (engine->credit) give_back(&node->credit.aggregates, bytes);
}

/* A chunk that was reserved is published; 0 when memory is out. */
int smlt_note_published(smlt_engine *engine, smlt_node *node, collective *c, uint32_t chunk) {
    node_credit *credit = &node->credit;
    if (!engine->credit) return 1;
    c->work[node->number].unpublished--;
    if (credit->count == credit->capacity) {
        size_t capacity = credit->capacity ? 2 * credit->capacity : 64;
        published_chunk *published = realloc(credit->published, capacity * sizeof *published);
        if (!published) return 0;
        credit->published = published;
        credit->capacity = capacity;
    }
    size_t at = credit->count++;
    for (; at > 0 && credit->published[at - 1].place.step > c->step; at--) credit->published[at] = credit->published[at - 1];
    if (at <= credit->question_first) credit->question_first++;
    credit->published[at] = (published_chunk){
        .place = {c->step, chunk}, .reader = c->chunks[chunk].reader, .bytes = smlt_chunk_stored_bytes(c, chunk)};
    return 1;
}

static void delete_aggregates(smlt_engine *engine, smlt_node *node, size_t first, size_t count) {
    node_credit *credit = &node->credit;
    if (count == 0) return;
    published_chunk *entries = credit->published + first;
    smlt_delete_aggregates(engine, node, entries, count);
    for (size_t i = 0; i < count; i++) {
        collective *c = smlt_find(engine, entries[i].place.step);
        if (c) c->gone[entries[i].place.chunk - c->own_first] = 1;
        give_back(&credit->aggregates, entries[i].bytes);
    }
    memmove(entries, entries + count, (credit->count - first - count) * sizeof *entries);
    credit->count -= count;
}

/* All collectives up to `completed` are, everywhere. */
void smlt_delete_read_aggregates(smlt_engine *engine, smlt_node *node, uint64_t completed) {
    node_credit *credit = &node->credit;
    size_t count = 0;
    while (count < credit->count && credit->published[count].place.step <= completed) count++;
    delete_aggregates(engine, node, 0, count);
    size_t before = credit->question_first < count ? credit->question_first : count, asked = count - before;
    credit->question_first -= before;
    credit->in_question -= asked < credit->in_question ? asked : credit->in_question;
}

/* Past the half, or when something waits: ask who has read what is published of the earliest collective, half of all at most. A
 * question about a later one is dropped: not everyone may have come to that. */
void smlt_ask_who_has_read(smlt_engine *engine, smlt_node *node) {
    node_credit *credit = &node->credit;
    if (credit->count == 0 || (credit->in_question && credit->question_first == 0)) return;
    if (!credit->blocked && credit->aggregates < engine->credit / 2) return;
    char text[SMLT_TOKEN_TEXT_MAX];
    size_t bytes = 0, count = 0;
    for (; count < credit->count && count < SMLT_PLACES_MAX && bytes < credit->aggregates / 2; count++) {
        const published_chunk *entry = &credit->published[count];
        if (entry->place.step != credit->published[0].place.step) break;
        smlt_place_pack(text + count * SMLT_PLACE_BYTES, entry->place);
        bytes += entry->bytes;
    }
    credit->question_first = 0;
    credit->in_question = count;
    credit->question++;
    smlt_tell(engine, node, -1,
              (smlt_token){.kind = SMLT_TOKEN_HAVE_YOU_READ,
                           .digest = credit->question,
                           .text = text,
                           .text_length = count * SMLT_PLACE_BYTES});
}

/* Who has completed a collective has read it; a chunk for one reader is nobody else's business. */
static int is_settled_for(const smlt_engine *engine, const node_credit *credit, int rank) {
    if (rank == engine->rank || credit->answered[rank] == credit->question) return 1;
    for (size_t i = 0; i < credit->in_question; i++) {
        const published_chunk *entry = &credit->published[credit->question_first + i];
        if ((entry->reader == 0 || entry->reader == rank + 1) && entry->place.step > engine->completed_by[rank]) return 0;
    }
    return 1;
}

static void take_answer(smlt_engine *engine, smlt_node *node, const smlt_token *token) {
    node->credit.answered[token->rank] = token->digest;
    for (int rank = 0; rank < engine->world_size; rank++)
        if (!is_settled_for(engine, &node->credit, rank)) return;
    delete_aggregates(engine, node, node->credit.question_first, node->credit.in_question);
    node->credit.question_first = node->credit.in_question = 0;
}

/* ---- aggregates: who reads them ---- */

static void answer_if_read(smlt_engine *engine, smlt_node *node, int owner) {
    const open_question *asked = &node->credit.asked[owner];
    if (asked->question && asked->count == 0)
        smlt_tell(engine, node, owner, (smlt_token){.kind = SMLT_TOKEN_HAVE_READ, .digest = asked->question});
}

static int has_read(smlt_engine *engine, smlt_place place) {
    if (place.step > engine->last_step) return 0;
    const collective *c = smlt_find(engine, place.step);
    return !c || c->result.status != SMLT_ACTIVE || place.chunk >= c->chunk_count || c->chunk_state[place.chunk] == CHUNK_DONE;
}

static void take_question(smlt_engine *engine, smlt_node *node, const smlt_token *token) {
    open_question *asked = &node->credit.asked[token->rank];
    asked->question = token->digest;
    asked->count = 0;
    for (size_t at = 0; at + SMLT_PLACE_BYTES <= token->text_length; at += SMLT_PLACE_BYTES) {
        smlt_place place = smlt_place_parse(token->text + at);
        if (!has_read(engine, place)) asked->unread[asked->count++] = place;
    }
    answer_if_read(engine, node, token->rank);
}

/* Of `chunk`, or of all of them (UINT32_MAX). */
static void note_read(smlt_engine *engine, smlt_node *node, int owner, uint64_t step, uint32_t chunk) {
    open_question *asked = &node->credit.asked[owner];
    uint32_t before = asked->count;
    for (uint32_t i = 0; i < asked->count;)
        if (asked->unread[i].step == step && (chunk == UINT32_MAX || asked->unread[i].chunk == chunk))
            asked->unread[i] = asked->unread[--asked->count];
        else
            i++;
    if (asked->count != before) answer_if_read(engine, node, owner);
}

void smlt_note_read(smlt_engine *engine, const collective *c, uint32_t chunk) {
    if (engine->credit) note_read(engine, chunk_node(engine, c, chunk), c->chunks[chunk].owner, c->step, chunk);
}

void smlt_note_read_all(smlt_engine *engine, const collective *c) {
    for (int i = 0; engine->credit && i < engine->node_count; i++)
        for (int owner = 0; owner < engine->world_size; owner++)
            note_read(engine, &engine->nodes[i], owner, c->step, UINT32_MAX);
}

void smlt_take_word_of_credit(smlt_engine *engine, smlt_node *node, const smlt_token *token) {
    if (!engine->credit) return;
    if (token->kind == SMLT_TOKEN_CONSUMED) smlt_contribution_consumed(node, (size_t)token->digest);
    if (token->kind == SMLT_TOKEN_HAVE_YOU_READ) take_question(engine, node, token);
    if (token->kind == SMLT_TOKEN_HAVE_READ && token->digest == node->credit.question) take_answer(engine, node, token);
}

/* ---- new connections ---- */

/* What was reserved is not any more; what was not confirmed is sent again; questions and answers may be lost. */
void smlt_credit_reconnected(smlt_engine *engine, smlt_node *node) {
    node_credit *credit = &node->credit;
    if (!engine->credit) return;
    credit->contributions = credit->aggregates = 0;
    credit->question_first = credit->in_question = 0;
    for (size_t i = 0; i < credit->count; i++) credit->aggregates += credit->published[i].bytes;
    for (const collective *c = engine->active; c; c = c->next)
        for (uint32_t chunk = 0; c->result.status == SMLT_ACTIVE && chunk < c->chunk_count; chunk++)
            if (c->node[chunk] == node->number && is_live(c, chunk)) credit->contributions += smlt_chunk_stored_bytes(c, chunk);
    for (int owner = 0; owner < engine->world_size; owner++) answer_if_read(engine, node, owner);
}

/* A bound on what lies in the store (invariant 6): of each node's window every worker has its part, a third each for its
 * contributions, its aggregates, and what it has asked for (replies lie in the server's buffers).
 *
 *   contributions  count from their SET until the owner says that it has deleted them: by the aggregate's token, which in a
 *                  collective larger than its part comes behind the UNLINK; of a chunk for one reader by a token of its own.
 *   aggregates     count from the MGET of the contributions until their UNLINK. Past the half an owner asks, by a token
 *                  to everyone: tell me when you have read up to this chunk. Who has, answers into its inbox.
 *
 * Nothing blocks for ever: such a collective has its contributions sent in an order that is the same on
 * all workers, so the first chunk that is not aggregated is the next one that each of them may send; and readers need no
 * credit.
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
        credit->acked = calloc(ranks, sizeof *credit->acked);
        credit->wanted = calloc(ranks, sizeof *credit->wanted);
        credit->told = calloc(ranks, sizeof *credit->told);
        if (!credit->acked || !credit->wanted || !credit->told) return 0;
    }
    return 1;
}

void smlt_credit_free(smlt_node *node) {
    free(node->credit.acked);
    free(node->credit.wanted);
    free(node->credit.told);
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
    if (!engine->credit) return 1;
    size_t live = c->algorithm == SMLT_HIERARCHICAL ? node->credit.contributions : node->credit.aggregates;
    return fits(engine, live, smlt_chunk_stored_bytes(c, chunk));
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

static int compare(place_read a, uint64_t step, uint32_t chunk) {
    if (a.step != step) return a.step < step ? -1 : 1;
    return a.chunk < chunk ? -1 : a.chunk > chunk;
}

int smlt_reserve_aggregate(const smlt_engine *engine, smlt_node *node, size_t bytes) {
    if (!engine->credit) return 1;
    if (!fits(engine, node->credit.aggregates, bytes)) return 0;
    node->credit.aggregates += bytes;
    return 1;
}

void smlt_unreserve_aggregate(const smlt_engine *engine, smlt_node *node, size_t bytes) {
    if (engine->credit) give_back(&node->credit.aggregates, bytes);
}

/* Of what was published and reserved; 0 when memory is out. */
int smlt_note_published(smlt_engine *engine, smlt_node *node, const collective *c, uint32_t chunk) {
    node_credit *credit = &node->credit;
    if (!engine->credit) return 1;
    if (credit->first > 0 && credit->count == credit->capacity) {
        credit->count -= credit->first;
        memmove(credit->published, credit->published + credit->first, credit->count * sizeof *credit->published);
        credit->first = 0;
    }
    if (credit->count == credit->capacity) {
        size_t capacity = credit->capacity ? 2 * credit->capacity : 64;
        published_chunk *published = realloc(credit->published, capacity * sizeof *published);
        if (!published) return 0;
        credit->published = published;
        credit->capacity = capacity;
    }
    credit->published[credit->count++] = (published_chunk){
        .step = c->step, .chunk = chunk, .reader = c->chunks[chunk].reader, .bytes = smlt_chunk_stored_bytes(c, chunk)};
    return 1;
}

static int is_read(const smlt_engine *engine, const node_credit *credit, const published_chunk *entry, uint64_t completed) {
    if (entry->step <= completed) return 1;
    for (int rank = 0; rank < engine->world_size; rank++)
        if (rank != engine->rank && (entry->reader == 0 || entry->reader == rank + 1) &&
            entry->step > engine->completed_by[rank] && compare(credit->acked[rank], entry->step, entry->chunk) < 0)
            return 0;
    return 1;
}

/* Delete what everyone has read; `completed`: all collectives up to this one are, everywhere. */
void smlt_delete_read_aggregates(smlt_engine *engine, smlt_node *node, uint64_t completed) {
    node_credit *credit = &node->credit;
    size_t end = credit->first;
    while (end < credit->count && is_read(engine, credit, &credit->published[end], completed)) end++;
    if (end == credit->first) return;
    smlt_delete_aggregates(engine, node, credit->published + credit->first, end - credit->first);
    for (; credit->first < end; credit->first++) {
        const published_chunk *entry = &credit->published[credit->first];
        collective *c = smlt_find(engine, entry->step);
        if (c) c->gone[entry->chunk - c->own_first] = 1;
        give_back(&credit->aggregates, entry->bytes);
    }
}

/* Past the half: ask who has read the older half of it. */
void smlt_ask_for_acknowledgements(smlt_engine *engine, smlt_node *node) {
    node_credit *credit = &node->credit;
    if (!engine->credit || credit->first == credit->count || credit->aggregates < engine->credit / 2) return;
    const published_chunk *oldest = &credit->published[credit->first];
    if (compare(credit->asked, oldest->step, oldest->chunk) >= 0) return; /* they have been asked */
    size_t last = credit->first, bytes = oldest->bytes;
    while (last + 1 < credit->count && bytes < credit->aggregates / 2) bytes += credit->published[++last].bytes;
    credit->asked = (place_read){credit->published[last].step, credit->published[last].chunk};
    smlt_tell(engine, node, -1, SMLT_TOKEN_HAVE_YOU_READ, credit->asked.step, credit->asked.chunk, 0);
}

void smlt_take_acknowledgement(smlt_engine *engine, smlt_node *node, const smlt_token *token) {
    if (!engine->credit) return;
    place_read *acked = &node->credit.acked[token->rank];
    if (compare(*acked, token->step, token->chunk) < 0) *acked = (place_read){token->step, token->chunk};
    smlt_delete_read_aggregates(engine, node, 0);
}

/* ---- aggregates: who reads them ---- */

static int has_read(const smlt_engine *engine, const smlt_node *node, int owner, place_read wanted) {
    const collective *c = smlt_find((smlt_engine *)engine, wanted.step);
    if (!c || c->result.status != SMLT_ACTIVE || wanted.chunk >= c->chunk_count) return 1;
    for (uint32_t chunk = wanted.chunk + 1; chunk-- > 0 && c->chunks[chunk].owner == owner;)
        if (c->node[chunk] == node->number && c->chunk_state[chunk] != CHUNK_DONE) return 0;
    return 1;
}

static void answer_if_read(smlt_engine *engine, smlt_node *node, int owner) {
    place_read *wanted = &node->credit.wanted[owner];
    if (!wanted->step || !has_read(engine, node, owner, *wanted)) return;
    node->credit.told[owner] = *wanted;
    smlt_tell(engine, node, owner, SMLT_TOKEN_HAVE_READ, wanted->step, wanted->chunk, 0);
    wanted->step = 0;
}

void smlt_take_question(smlt_engine *engine, smlt_node *node, const smlt_token *token) {
    if (!engine->credit) return;
    node->credit.wanted[token->rank] = (place_read){token->step, token->chunk};
    answer_if_read(engine, node, token->rank);
}

void smlt_note_read(smlt_engine *engine, const collective *c, uint32_t chunk) {
    if (engine->credit) answer_if_read(engine, chunk_node(engine, c, chunk), c->chunks[chunk].owner);
}

void smlt_note_read_all(smlt_engine *engine, const collective *c) {
    for (int i = 0; engine->credit && i < engine->node_count; i++)
        for (int owner = 0; owner < engine->world_size; owner++)
            if (engine->nodes[i].credit.wanted[owner].step == c->step) answer_if_read(engine, &engine->nodes[i], owner);
}

/* ---- new connections ---- */

/* What was reserved is not any more; what was not confirmed is sent again; questions and answers may be lost. */
void smlt_credit_reconnected(smlt_engine *engine, smlt_node *node) {
    node_credit *credit = &node->credit;
    if (!engine->credit) return;
    credit->contributions = credit->aggregates = 0;
    credit->asked.step = 0;
    for (size_t i = credit->first; i < credit->count; i++) credit->aggregates += credit->published[i].bytes;
    for (const collective *c = engine->active; c; c = c->next)
        for (uint32_t chunk = 0; c->result.status == SMLT_ACTIVE && chunk < c->chunk_count; chunk++)
            if (c->node[chunk] == node->number && is_live(c, chunk)) credit->contributions += smlt_chunk_stored_bytes(c, chunk);
    for (int owner = 0; owner < engine->world_size; owner++)
        if (credit->told[owner].step)
            smlt_tell(engine, node, owner, SMLT_TOKEN_HAVE_READ, credit->told[owner].step, credit->told[owner].chunk, 0);
}

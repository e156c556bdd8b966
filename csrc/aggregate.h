/* The collective as a state machine: bytes in, bytes out, no sockets, no clock of its own to wait on.
 *
 * An engine belongs to one worker of one job session and carries several collectives at a time, numbered by step. A
 * collective is a plan: segments of the caller's memory cut in chunks, each chunk with an owner.
 *
 *   reduce  everyone uploads its contribution to each chunk it does not own; the owner, told by tokens, fetches all
 *           contributions with one MGET in rank order, adds them to its own as they stream in, publishes the result.
 *   copy    the owner publishes its own data (broadcast, allgather).
 *   Then everyone fetches each published chunk, told by tokens: all of them, or those that this worker is the reader of.
 *   An owner who alone reads what it has aggregated does not publish it.
 *   one shot  (small reductions) everyone's contribution travels inside a token that everyone reads; each worker adds
 *           them all, in rank order: one way through the store instead of two.
 *
 * The store is one or more nodes. Chunk c of its owner's chunks lies on node (owner + c) mod nodes, with its tokens: so every
 * node has the same to carry whatever the number of owners. To each node three lanes, so that nothing waits behind anything
 * else: UP carries uploads and aggregates, DOWN the MGETs, TOKENS the blocking XREAD. Rank 0 hears of every worker in
 * every collective and checks that all called the same (invariant 7).
 */
#ifndef SMLT_AGGREGATE_H
#define SMLT_AGGREGATE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "codec.h"
#include "trace.h"

typedef enum {
    SMLT_OK,
    SMLT_ACTIVE, /* the collective is not complete yet */
    SMLT_NO_MEMORY,
    SMLT_PROTOCOL,     /* the store's bytes are not what they must be */
    SMLT_STORE_ERROR,  /* an error reply */
    SMLT_STORE_FULL,   /* -OOM */
    SMLT_STORE_DENIED, /* -NOAUTH, -WRONGPASS, -NOPERM */
    SMLT_VANISHED,     /* a key that was announced is gone: evicted, expired or flushed */
    SMLT_MISMATCH,     /* workers called different collectives */
    SMLT_LOST,         /* a worker did not come; text: "<rank>,<rank>...\x1f<message>" */
    SMLT_ABORTED,      /* another worker, or the scheduler, ended it */
    SMLT_FENCED,       /* a newer generation has begun */
    SMLT_STORE_REFUSES /* an error reply that passes (-LOADING, -READONLY, ...): connect anew and try again */
} smlt_status;

#define SMLT_MESSAGE_MAX 1100

typedef struct {
    smlt_status status;
    char message[SMLT_MESSAGE_MAX];
} smlt_error;

enum { SMLT_LANE_UP, SMLT_LANE_DOWN, SMLT_LANE_TOKENS, SMLT_LANE_KINDS };

/* A lane's number is its node's times SMLT_LANE_KINDS and its kind. */
#define SMLT_NODES_MAX 64
#define SMLT_LANES_MAX (SMLT_NODES_MAX * SMLT_LANE_KINDS)

typedef struct {
    int dtype, codec;
    const void *source;
    void *target; /* may be the same memory as source */
    int64_t source_count, target_count;
    const void *residual; /* error feedback: what earlier encodings lost, element by element as in source; or NULL */
    void *next_residual;  /* receives what this one loses; NULL: no error feedback. Other memory than residual */
} smlt_segment;

typedef struct {
    int32_t segment, owner;
    int64_t source, target, count; /* elements of the segment; chunks are sorted by owner */
    int32_t reader; /* 0: everyone wants the result; r + 1: rank r alone, who is another than the owner of a copy */
} smlt_chunk;

typedef enum {
    SMLT_COPY,         /* owners publish their own data */
    SMLT_HIERARCHICAL, /* owners aggregate the contributions to their chunks */
    SMLT_ONE_SHOT      /* everybody reads everybody's contribution; owners mean nothing */
} smlt_algorithm;

#define SMLT_ONE_SHOT_BYTES_MAX (64u << 10) /* of a contribution: it travels inside its arrival token */

typedef struct {
    smlt_algorithm algorithm;
    int operation;
    uint64_t digest;         /* equal on all workers that call the same */
    const char *description; /* of the call, for the message when they do not */
    const smlt_segment *segments;
    int segment_count;
    const smlt_chunk *chunks; /* kept by the caller until the collective ends */
    int chunk_count;
} smlt_plan;

typedef struct smlt_engine smlt_engine;

/* `prefixes` of the session's keys, one for each of `nodes` nodes; `control_key` the stream on the first of them, on which the
 * scheduler speaks to this generation; keys live `ttl_ms`; no chunk is larger than `chunk_elements`, nor than `chunk_bytes`
 * on the wire; about `window_bytes` are under way each way; all workers together take no more than `store_window_bytes` of a
 * node's memory (0: as much as it comes to). NULL when memory is out. */
smlt_engine *smlt_engine_new(int rank, int world_size, uint64_t generation, int nodes, const char *const *prefixes,
                             const char *control_key, int64_t ttl_ms, size_t chunk_elements, size_t chunk_bytes,
                             size_t window_bytes, size_t store_window_bytes);
void smlt_engine_free(smlt_engine *engine);
int smlt_engine_lanes(const smlt_engine *engine);

/* Begin the next collective; `*step` receives its number (1, 2, ...). The segments' memory stays the engine's until the
 * collective has ended and smlt_engine_retire was called. */
smlt_status smlt_engine_submit(smlt_engine *engine, const smlt_plan *plan, uint64_t *step);

/* SMLT_ACTIVE, SMLT_OK, or how it failed. */
smlt_status smlt_engine_state(smlt_engine *engine, uint64_t step, smlt_error *error);
void smlt_engine_retire(smlt_engine *engine, uint64_t step);
int smlt_engine_has_ended(smlt_engine *engine, uint64_t step); /* one way or another; so has all when the engine failed */
int smlt_engine_unfinished(const smlt_engine *engine);         /* some collective has not ended, and may go on */
uint64_t smlt_engine_ends(const smlt_engine *engine);          /* how many collectives have ended so far */
int smlt_engine_flushed(const smlt_engine *engine);            /* everything queued is sent and answered but a blocking wait */

/* End an active collective in error here, take back what was uploaded and, when `announce`, tell everyone. */
void smlt_engine_abandon(smlt_engine *engine, uint64_t step, smlt_status status, const char *text, int announce);

/* A newer generation has begun (the engine also hears of it on the control stream): collectives under way count as ended,
 * with SMLT_FENCED, and the engine rests. They are as they were: after smlt_engine_complete_fenced(engine, 1) it goes on. */
void smlt_engine_fence(smlt_engine *engine, uint64_t generation);
uint64_t smlt_engine_fenced_by(const smlt_engine *engine); /* 0: by none */
void smlt_engine_complete_fenced(smlt_engine *engine, int on);
uint64_t smlt_engine_first_unfinished(const smlt_engine *engine); /* step; 0: all have ended */
uint64_t smlt_engine_failures(const smlt_engine *engine);         /* how many have ended otherwise than complete */

/* This worker calls no more. What is under way ends in error here; when `announce`, whoever waits for it, in that or in the
 * next collective, is told at once. */
void smlt_engine_leave(smlt_engine *engine, const char *text, int announce);

/* For the message when a deadline has passed: the lowest owner whose aggregate is missing, -1 when none is, and on rank
 * 0 whether `rank` has taken part. */
int smlt_engine_vanished(smlt_engine *engine, uint64_t step, smlt_error *error); /* 1: a chunk was announced, is not there */
int smlt_engine_missing_owner(smlt_engine *engine, uint64_t step);
int smlt_engine_has_joined(smlt_engine *engine, uint64_t step, int rank);

/* I/O, driven by a transport. Output: iovecs of what a lane has to send; then say how much was sent. Input: where to
 * put received bytes; then how many. smlt_engine_received returns a status other than SMLT_OK when the engine is of no
 * further use (smlt_engine_fatal tells why), or the connections are (SMLT_STORE_REFUSES: smlt_engine_refusal tells why). */
int smlt_engine_output(smlt_engine *engine, int lane, struct iovec *vectors, int max);
void smlt_engine_sent(smlt_engine *engine, int lane, size_t bytes);
char *smlt_engine_input(smlt_engine *engine, int lane, size_t *capacity);
smlt_status smlt_engine_received(smlt_engine *engine, int lane, size_t bytes);
const smlt_error *smlt_engine_fatal(const smlt_engine *engine);
/* The error reply for which these connections were given up: SMLT_STORE_REFUSES or SMLT_STORE_FULL; SMLT_OK: none. */
const smlt_error *smlt_engine_refusal(const smlt_engine *engine);
void smlt_engine_give_up(smlt_engine *engine); /* the refusal does not pass: the engine fails with it */

/* A connection can be dead without anyone being told. A lane that expects a reply on which nothing has moved for
 * `silence_ms` counts as lost; waits in the store are shorter, so that there is always a reply to come. */
void smlt_engine_set_silence(smlt_engine *engine, int64_t silence_ms);
/* Whoever drives asks at least every second; 1: a lane is lost. `unsent`, by lane: bytes in the network's queue, or NULL. */
int smlt_engine_is_silent(smlt_engine *engine, int64_t now_ms, const int *unsent);

/* A node has come back empty, or without the last writes. Before smlt_engine_reconnected: what is under way there is done
 * again from the callers' memory, whether it had been confirmed or not. */
void smlt_engine_data_lost(smlt_engine *engine, int node);

/* All lanes have new connections: redo what was not confirmed, look for missing chunks by key (invariant 5). */
void smlt_engine_reconnected(smlt_engine *engine);

smlt_trace *smlt_engine_trace(smlt_engine *engine);
size_t smlt_engine_requested(const smlt_engine *engine);   /* bytes asked for and not received */
size_t smlt_engine_unconfirmed(const smlt_engine *engine); /* bytes sent and not confirmed */

int64_t smlt_clock_ms(void); /* monotonic */

#endif

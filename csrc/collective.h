/* Inside the engine: shared by aggregate.c (state), send.c and delete.c (commands), receive.c (replies) and the rest. */
#ifndef SMLT_COLLECTIVE_H
#define SMLT_COLLECTIVE_H

#include "aggregate.h"
#include "lane.h"
#include "trace.h"
#include "wire.h"

#define AHEAD_MAX (1u << 20)             /* tokens of collectives further ahead than this are no hints of ours */
#define EARLY_BYTES_MAX (16u << 20)      /* tokens kept for collectives not begun here */
#define FETCH_TOGETHER_BYTES (64u << 10) /* aggregates that one MGET asks for */
#define TRIM_BYTES (64u << 10)           /* of tokens read before the streams are trimmed again */
#define UPLOAD_QUEUE_BYTES (64u << 10)   /* encoded and not sent: an aggregate waits behind so much */
#define NODE_WINDOW_BYTES (256u << 10)   /* of each of several nodes at least */
#define BULK_FOR_UPLOADS 4
#define BULK_FOR_AGGREGATES 8
#define BULK_FOR_EACH_NODE 2       /* of each, behind the first node */
#define STREAMING_BYTES (1u << 20) /* a larger target leaves a core's caches before anyone reads it */
#define INPUT_BYTES (256u << 10)
#define SILENCE_MS 10000
#define UNATTENDED_MS 3000 /* nobody has looked after the connections: the process slept, or had nothing to wait for */
#define REFETCHES 16
#define VANISHED_MS 20000 /* so long may the sender of a chunk that is announced and not there send it again */

enum { INBOX, OUTBOX, CONTROL, STREAMS };
enum { CHUNK_WAITING, CHUNK_READY, CHUNK_REQUESTED, CHUNK_PUBLISHED, CHUNK_DONE };
enum { UPLOAD_UNSENT, UPLOAD_SENT, UPLOAD_STORED };

typedef struct {
    uint32_t *chunks;
    uint32_t first, count; /* chunks[first, count) are still to be dealt with */
} chunk_queue;

/* What a collective has to do at one node. */
typedef struct {
    chunk_queue uploads;                   /* in the order in which they are sent; first: the next to look at */
    chunk_queue contributions, aggregates; /* to be fetched */
    chunk_queue republish;                 /* own aggregates that a lost connection may have swallowed */
    uint32_t own, chunks;                  /* how many chunks are this worker's, and in all */
    uint32_t unpublished;                  /* own chunks, where that counts (credit.c) */
    size_t largest_aggregate;              /* bytes that the largest of them takes in the store */
    struct {
        uint32_t contributions, aggregates; /* how many were waited for again since the connections are new */
    } again;
} node_work;

typedef struct {
    smlt_segment segment;
    smlt_kernel kernel;
} typed_segment;

typedef struct collective {
    struct collective *next; /* by step */
    uint64_t step, digest;
    smlt_algorithm algorithm;
    int recovered;       /* a connection was lost on the way */
    int uploads_deleted; /* their credit was given back */
    int bounded;         /* larger than the credit: sent in the same order by all */
    smlt_error result;   /* status SMLT_ACTIVE until it ends */
    char *description;

    typed_segment *segments;
    const smlt_chunk *chunks;
    uint32_t chunk_count, own_first, own_end;

    uint8_t *node;         /* by chunk: where it lies */
    node_work *work;       /* by node */
    uint8_t *upload_state; /* by chunk */
    uint32_t uploads_left; /* not UPLOAD_STORED */
    uint32_t hello_left;   /* 1: a token that only says that this worker takes part is not confirmed yet */
    uint32_t hello_unsent; /* 1: nor sent */

    uint8_t *chunk_state;
    uint8_t *aggregated; /* others' chunks: they hold this worker's contribution, even if they are to be looked for again */
    int32_t *exponent;   /* of own published chunks */
    char *headers;       /* of their blocks, one chunk after the other; `headers_at` says where. NULL when there are none */
    size_t *headers_at;
    uint8_t *gone;    /* own chunks: read by all and deleted */
    uint8_t *shift;   /* of own chunks: 2^-shift while adding, so that a mean does not overflow */
    uint8_t *arrived; /* own chunk x rank */
    uint32_t *arrived_count;
    uint32_t chunks_left; /* not CHUNK_DONE */
    uint32_t tokens_left; /* CHUNK_WAITING for tokens; of a one-shot reduction the parts */
    uint8_t *joined;      /* on rank 0, by rank: took part, with the same digest */
    int joined_left;

    struct { /* one-shot: everyone's contribution, encoded, by rank */
        char *bytes;
        size_t size;
        uint8_t *arrived;
        int unsent, encoded; /* this worker's own */
    } parts;

    struct {              /* the chunk that was announced and not there, the last one */
        int64_t since_ms; /* 0: none */
        uint32_t chunk;
        int rank;
    } vanished;

    size_t block_size; /* of the block that holds this and all the arrays above */
} collective;

/* What is to be deleted once every worker has completed `step`. */
typedef struct {
    uint64_t step;
    uint32_t own_first, own_end;
} remains;

/* Kept for a collective not begun here, with the token and the one-shot part behind it. */
typedef struct {
    uint64_t step; /* 0: taken */
    uint32_t length, part_length;
    int32_t node;
} early_token;

typedef struct {
    smlt_place place;
    int32_t reader; /* as in smlt_chunk */
    size_t bytes;
} published_chunk;

/* What an owner has asked this worker, and what of it is not read yet. */
typedef struct {
    uint64_t question; /* 0: nothing was asked */
    uint32_t count;
    smlt_place unread[SMLT_PLACES_MAX];
} open_question;

/* How much of this worker's lies at a node, when that is bounded (credit.c). */
typedef struct {
    size_t contributions, aggregates; /* bytes; of aggregates also what is reserved */
    size_t asked_bytes;               /* asked for since nothing was outstanding */
    int blocked;                      /* something waits for credit */
    published_chunk *published;       /* by step: what is not known to be read by all */
    size_t count, capacity;
    uint64_t question;                  /* the last one that this worker has asked */
    size_t question_first, in_question; /* it was about these of `published`; none: it is settled */
    uint64_t *answered;                 /* by rank: the last question that it has answered */
    open_question *asked;               /* by rank: its question to this worker */
} node_credit;

/* A node of the store as this worker sees it: the names of what lies there, the lanes to it, and what is under way on them. */
typedef struct {
    int number;
    char prefix[SMLT_PREFIX_MAX + 1];
    int streams; /* INBOX and OUTBOX; on the first node CONTROL too */
    char stream_key[STREAMS][SMLT_KEY_MAX];
    char stream_id[STREAMS][48]; /* last entry read, or under way */
    char before_id[STREAMS][48]; /* the one before it: read again from here when the entry under way is cut off */
    char rewind_id[STREAMS][48]; /* where to read again for tokens that were not kept, or "" */
    uint64_t early_dropped;      /* the last step of which a token was not kept */
    int rewind;                  /* read again, now */
    int64_t *expiry_set_ms;      /* by rank: inbox; [world_size]: outbox */

    smlt_lane lanes[SMLT_LANE_KINDS];
    int unsent[SMLT_LANE_KINDS]; /* what the network had not taken when it was last looked at */
    /* Sent and not confirmed, requested and not received: bounded by the window, lest tokens and commands wait behind
     * megabytes in the network's queues and the server's output buffer. */
    size_t upload_outstanding, fetch_outstanding;
    int waiting_for_tokens; /* an XREAD is under way */
    char *accumulator;      /* of the contributions that come down */
    node_credit credit;

    size_t token_bytes_since_trim;
    struct { /* up to here the streams are trimmed when all workers have completed `newest` */
        char inbox_id[48], outbox_id[48];
        uint64_t newest; /* the newest step of which a token had been read by then; 0: not set */
    } trim;
    struct { /* the reply under way on DOWN: which element, how far */
        uint32_t element, elements_done;
        int header_seen, incomplete; /* incomplete: an element was not there */
        smlt_header header;
    } reading;
    struct {                              /* the XREAD reply under way */
        int stream, is_value, entry_seen; /* an entry's name has come, of this reply and stream */
        char field[16], control_kind[16];
        char token[SMLT_TOKEN_MAX]; /* of the entry under way */
        size_t token_length;
    } tokens;
} smlt_node;

struct smlt_engine {
    int rank, world_size;
    uint64_t generation;
    int64_t ttl_ms;
    smlt_node *nodes;
    int node_count;
    int64_t silence_ms, looked_at_ms; /* for how long a lane may be still; when that was last looked at */
    smlt_message_pool pool;
    smlt_error fatal;
    smlt_error refusal; /* an error reply that passes: nothing more is read of these connections */
    smlt_trace trace;

    collective *active; /* by step; retired ones leave the list */
    uint64_t last_step, completed, ends;
    uint64_t failures;      /* how many have ended otherwise than complete */
    uint64_t fenced_by;     /* a newer generation; 0: none */
    int completing;         /* though fenced, go on */
    uint64_t failed_step;   /* the first that failed otherwise than by a mismatch; 0: none */
    uint64_t *completed_by; /* by rank, what its tokens say */

    resp_buffer early; /* tokens of collectives not begun here; [0, early_first) are taken */
    size_t early_first;
    remains *past;
    size_t past_first, past_count, past_capacity;
    uint64_t newest_seen; /* step of a token */

    char *spare; /* the block of a collective that is over, for the next one */
    size_t spare_size;
    char *one_shot_accumulator; /* none of the nodes': contributions may be half way through there */
    size_t chunk_elements, chunk_bytes;
    size_t window_bytes;              /* asked for at each node and not received, at most */
    size_t upload_least, upload_most; /* sent to each and not confirmed, at first and later */
    size_t credit;        /* what may lie at each node of this worker's contributions, and of its aggregates; 0: unbounded */
    size_t fetched_bytes; /* received since the first of the active collectives began */
};

static inline int node_of(const smlt_engine *engine, int owner, uint32_t position) {
    return (int)(((uint32_t)owner + position) % (uint32_t)engine->node_count);
}
static inline smlt_node *chunk_node(const smlt_engine *engine, const collective *c, uint32_t chunk) {
    return &engine->nodes[c->node[chunk]];
}
/* The tokens of a one-shot reduction hold all there is: another node each time. */
static inline smlt_node *one_shot_node(const smlt_engine *engine, const collective *c) {
    return &engine->nodes[c->step % (uint64_t)engine->node_count];
}

static inline uint32_t others(const smlt_engine *engine) { return (uint32_t)engine->world_size - 1; }

/* Whether the result of a chunk is for this worker, and whether it is for its owner alone. */
static inline int is_reader(const smlt_chunk *chunk, int rank) { return chunk->reader == 0 || chunk->reader == rank + 1; }
static inline int is_kept(const smlt_chunk *chunk) { return chunk->reader == chunk->owner + 1; }

/* plan.c */
collective *smlt_collective_new(smlt_engine *engine, const smlt_plan *plan); /* NULL: no memory, or unsound */
void smlt_collective_free(smlt_engine *engine, collective *c);

/* one_shot.c */
size_t smlt_part_size(const smlt_plan *plan);
const char *smlt_own_part(smlt_engine *engine, collective *c);
void smlt_part_is_there(smlt_engine *engine, collective *c, int rank, const char *bytes, size_t length);

/* aggregate.c */
smlt_status smlt_fail_engine(smlt_engine *engine, smlt_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
collective *smlt_find(smlt_engine *engine, uint64_t step);
void smlt_end_collective(smlt_engine *engine, collective *c, smlt_status status, const char *message, size_t length);
/* A token read from a stream (`bytes`: as it was read), or a one-shot part with its token. */
smlt_status smlt_take_token(smlt_engine *engine, smlt_node *node, const smlt_token *token, const char *bytes, size_t length);
smlt_status smlt_take_part(smlt_engine *engine, smlt_node *node, const smlt_token *token, const char *bytes, size_t length,
                           const char *part, size_t part_length);
void smlt_queue_fetch(chunk_queue *queue, collective *c, uint32_t chunk);
void smlt_contribution_is_there(smlt_engine *engine, collective *c, uint32_t chunk, int rank);
void smlt_aggregate_is_there(smlt_engine *engine, collective *c, uint32_t chunk);
void smlt_end_if_complete(smlt_engine *engine, collective *c);
void smlt_chunk_complete(smlt_engine *engine, collective *c, uint32_t chunk);

/* send.c */
void smlt_compose(smlt_engine *engine, smlt_node *node, int kind);
void smlt_publish(smlt_engine *engine, collective *c, uint32_t chunk, const void *elements, int exponent, int purpose);
void smlt_keep(smlt_engine *engine, collective *c, uint32_t chunk);
void smlt_announce(smlt_engine *engine, uint64_t step, int kind, smlt_status status, const char *text, size_t length);
/* A token to one worker, or to everyone (-1). */
void smlt_tell(smlt_engine *engine, smlt_node *node, int to_rank, smlt_token token);
void smlt_tell_consumed(smlt_engine *engine, const collective *c, uint32_t chunk);
void smlt_publish_token(smlt_engine *engine, collective *c, uint32_t chunk);
void smlt_end_wait(smlt_engine *engine, smlt_node *node, uint64_t step);

smlt_message *smlt_new_text(smlt_engine *engine); /* NULL: the engine has failed */
void smlt_queue(smlt_engine *engine, smlt_node *node, int kind, smlt_message *message);
void smlt_expect(smlt_engine *engine, smlt_node *node, int kind, smlt_expectation expectation);
void smlt_expect_nothing(smlt_engine *engine, smlt_node *node); /* of a reply: only an error matters */

int smlt_encode_contribution(const typed_segment *typed, const smlt_chunk *chunk, void *wire);

/* delete.c */
void smlt_delete_contributions(smlt_engine *engine, collective *c, uint32_t chunk);
void smlt_delete_uploads(smlt_engine *engine, collective *c);
void smlt_delete_aggregates(smlt_engine *engine, smlt_node *node, const published_chunk *published, size_t count);
void smlt_delete_remains(smlt_engine *engine, const remains *past);
void smlt_trim_streams(smlt_engine *engine, smlt_node *node);

/* credit.c: does nothing but say yes where nothing is bounded */
int smlt_credit_init(smlt_engine *engine, size_t store_window_bytes);
void smlt_credit_free(smlt_node *node);
void smlt_credit_reconnected(smlt_engine *engine, smlt_node *node);
size_t smlt_stored_bytes(size_t bytes);
size_t smlt_chunk_stored_bytes(const collective *c, uint32_t chunk);
int smlt_may_fetch(const smlt_engine *engine, smlt_node *node, const collective *c, size_t bytes);
int smlt_may_upload(const smlt_engine *engine, const smlt_node *node, const collective *c, uint32_t chunk);
void smlt_contribution_consumed(smlt_node *node, size_t bytes);
void smlt_uploads_deleted(smlt_engine *engine, const collective *c);
int smlt_reserve_aggregate(const smlt_engine *engine, smlt_node *node, const collective *c, uint32_t chunk);
void smlt_count_aggregates(const smlt_engine *engine, collective *c);
void smlt_unreserve_aggregate(const smlt_engine *engine, smlt_node *node, size_t bytes);
int smlt_note_published(smlt_engine *engine, smlt_node *node, collective *c, uint32_t chunk);
void smlt_delete_read_aggregates(smlt_engine *engine, smlt_node *node, uint64_t completed);
void smlt_ask_who_has_read(smlt_engine *engine, smlt_node *node);
void smlt_take_word_of_credit(smlt_engine *engine, smlt_node *node, const smlt_token *token);
void smlt_note_read(smlt_engine *engine, const collective *c, uint32_t chunk);
void smlt_note_read_all(smlt_engine *engine, const collective *c);

/* fence.c */
int smlt_is_frozen(const smlt_engine *engine); /* fenced, and not to complete what is under way */
void smlt_fence_error(const smlt_engine *engine, smlt_error *error);

/* recover.c */
int smlt_has_vanished(const smlt_engine *engine, const collective *c, int64_t for_ms, smlt_error *error);
void smlt_contributions_incomplete(smlt_engine *engine, collective *c, uint32_t chunk);
void smlt_chunk_is_not_there(smlt_engine *engine, collective *c, uint32_t chunk, int rank);
void smlt_ask_existence(smlt_engine *engine, smlt_node *node, collective *c);

/* receive.c */
uint8_t smlt_shift_for(int world_size);
smlt_status smlt_decode(smlt_engine *engine, smlt_node *node, int kind);

#endif

/* A lane: one connection to the store as seen by the collective, without the socket.
 *
 * Out: a queue of messages (commands, a chunk's payload between them), handed to the transport as iovecs straight from
 * where they were encoded. In: one receive buffer, decoded in place. The store answers in the order of the commands,
 * so each command leaves an `expectation` that says what its reply will mean.
 */
#ifndef SMLT_LANE_H
#define SMLT_LANE_H

#include <sys/uio.h>

#include "resp.h"

/* What a bulk message is for. Each has its share: aggregates must not take it all while there are contributions to send,
 * or one worker would serve the others first and keep them waiting for its own; and uploads that wait for their link must
 * not hold up what comes down. */
enum { SMLT_FOR_UPLOADS, SMLT_FOR_AGGREGATES, SMLT_PURPOSES };

typedef struct smlt_message {
    struct smlt_message *next;
    resp_buffer head, tail; /* command text before and after the payload */
    char *payload;          /* storage of a bulk message, NULL in a text message */
    size_t payload_length;
    size_t sent; /* of head + payload + tail */
    int purpose; /* of a bulk message */
} smlt_message;

/* Recycled messages: bulk ones are a fixed set, text ones are made as needed. */
typedef struct {
    smlt_message *free_bulk, *free_text;
    int share[SMLT_PURPOSES], available[SMLT_PURPOSES]; /* bulk messages: in all, and neither in use nor reserved */
} smlt_message_pool;

int smlt_pool_init(smlt_message_pool *pool, const int share[SMLT_PURPOSES], size_t payload_capacity);
void smlt_pool_free(smlt_message_pool *pool);
smlt_message *smlt_pool_take_text(smlt_message_pool *pool); /* NULL when memory is out */
/* A bulk message is reserved before it is needed, then taken: an aggregate never waits for room in the middle. */
int smlt_pool_reserve(smlt_message_pool *pool, int purpose); /* 0 when all are in use or reserved */
void smlt_pool_unreserve(smlt_message_pool *pool, int purpose);
void smlt_pool_unreserve_all(smlt_message_pool *pool); /* when none is in use */
smlt_message *smlt_pool_take_bulk(smlt_message_pool *pool, int purpose);
void smlt_pool_give(smlt_message_pool *pool, smlt_message *message);

typedef enum {
    EXPECT_SET,                 /* of a chunk: it counts when its token is there too */
    EXPECT_CONTRIBUTION_STORED, /* XADD of the token behind my contribution, upload `first` */
    EXPECT_AGGREGATE_SET,       /* SET of an aggregate whose token is to come behind the UNLINK of its contributions */
    EXPECT_AGGREGATE_STORED,    /* XADD of the token behind an aggregate of mine */
    EXPECT_HELLO_STORED,        /* XADD of a token that only says that this worker takes part */
    EXPECT_PART_STORED,         /* XADD of my one-shot contribution */
    EXPECT_IGNORED,             /* XADD, PEXPIRE, UNLINK, XTRIM: only an error matters */
    EXPECT_TOKENS,              /* XREAD */
    EXPECT_CONTRIBUTIONS,       /* MGET of all others' contributions to `chunk`; `first`: bytes reserved for its aggregate */
    EXPECT_AGGREGATES,          /* MGET of `count` aggregates, fetch_order[first ...] */
    EXPECT_CONTRIBUTION_EXISTS, /* EXISTS of rank `first`'s contribution to `chunk` */
    EXPECT_AGGREGATE_EXISTS     /* EXISTS of the aggregated `chunk` */
} smlt_expectation_kind;

typedef struct {
    uint64_t step;
    uint32_t chunk, first, count;
    smlt_expectation_kind kind;
    size_t bytes; /* of content that was sent or asked for */
} smlt_expectation;

typedef struct {
    smlt_message *head, *tail;
    size_t queued_bytes;

    smlt_expectation *expected; /* ring */
    size_t expected_capacity, expected_first, expected_count;

    resp_decoder decoder;
    char *input;
    size_t input_capacity, input_start, input_end;

    uint64_t moved, moved_before; /* bytes sent and received, and how many when it was last looked at */
    int64_t still_since_ms;
} smlt_lane;

int smlt_lane_init(smlt_lane *lane, size_t input_capacity);
void smlt_lane_free(smlt_lane *lane, smlt_message_pool *pool);
/* The connection is gone: forget what was queued, expected and half received. */
void smlt_lane_reset(smlt_lane *lane, smlt_message_pool *pool);

void smlt_lane_queue(smlt_lane *lane, smlt_message *message);
int smlt_lane_expect(smlt_lane *lane, smlt_expectation expectation); /* 0 when memory is out */
smlt_expectation *smlt_lane_expected(smlt_lane *lane);               /* the oldest, NULL when none */
void smlt_lane_expected_done(smlt_lane *lane);

/* How long a reply has been expected and nothing has moved; looked at now and then. */
int64_t smlt_lane_still_ms(smlt_lane *lane, int64_t now_ms);
void smlt_lane_is_alive(smlt_lane *lane, int64_t now_ms); /* or nobody has looked after it */

int smlt_lane_output(const smlt_lane *lane, struct iovec *vectors, int max);
void smlt_lane_sent(smlt_lane *lane, smlt_message_pool *pool, size_t bytes);

/* Room for received bytes at the end of the input; compacted by smlt_lane_compact after decoding. */
char *smlt_lane_room(smlt_lane *lane, size_t *capacity);
void smlt_lane_compact(smlt_lane *lane);

#endif

/* What lies in the parameter store: names of keys, the header before a chunk's elements, and arrival tokens.
 *
 *   <prefix><step>:u:<chunk>:<rank>   a worker's contribution to a chunk, read by the chunk's owner
 *   <prefix><step>:a:<chunk>          the aggregated chunk, read by everyone
 *   <prefix>in:<rank>                 stream of tokens for one worker: contributions to its chunks have arrived
 *   <prefix>agg                       stream of tokens for everyone: aggregated chunks, one-shot contributions, aborts
 *
 * An entry of a stream has the field "t", the token, and for a one-shot contribution "p": for each chunk the exponent (4
 * bytes) and the encoded elements.
 *
 * The prefix names the job, generation and session (smlt/store/parameter.py), so another generation's keys are other
 * keys (invariant 4). Numbers are little-endian. Everything read back is checked before it is used.
 */
#ifndef SMLT_WIRE_H
#define SMLT_WIRE_H

#include <stddef.h>
#include <stdint.h>

#define SMLT_PREFIX_MAX 160
#define SMLT_KEY_MAX (SMLT_PREFIX_MAX + 80)

size_t smlt_key_contribution(char key[SMLT_KEY_MAX], const char *prefix, uint64_t step, uint32_t chunk, int rank);
size_t smlt_key_aggregate(char key[SMLT_KEY_MAX], const char *prefix, uint64_t step, uint32_t chunk);
size_t smlt_key_inbox(char key[SMLT_KEY_MAX], const char *prefix, int rank);
size_t smlt_key_outbox(char key[SMLT_KEY_MAX], const char *prefix);

#define SMLT_HEADER_BYTES 40

typedef struct {
    uint64_t step, digest;
    uint32_t chunk, elements;
    int32_t exponent;
    uint16_t rank; /* who encoded it */
} smlt_header;

void smlt_header_pack(char bytes[SMLT_HEADER_BYTES], const smlt_header *header);
/* 0 when the bytes are no header of this version. */
int smlt_header_parse(const char *bytes, size_t length, smlt_header *header);

#define SMLT_TOKEN_BYTES 40
#define SMLT_TOKEN_TEXT_MAX 1024
#define SMLT_TOKEN_MAX (SMLT_TOKEN_BYTES + SMLT_TOKEN_TEXT_MAX)

typedef enum {
    SMLT_TOKEN_CONTRIBUTION = 1, /* `rank` has uploaded its contribution to `chunk` */
    SMLT_TOKEN_AGGREGATE = 2,    /* `rank` has published the aggregated `chunk` */
    SMLT_TOKEN_HELLO = 3,        /* `rank` takes part in `step`; nothing uploaded */
    SMLT_TOKEN_ABORT = 4,        /* `step` ends in error for everyone: `status` and `text` say why */
    SMLT_TOKEN_PART = 5,         /* `rank`'s contribution to a one-shot reduction lies beside this token */
    SMLT_TOKEN_CONSUMED = 6,     /* `rank` has deleted the contributions to `chunk`; `digest`: bytes that each took */
    SMLT_TOKEN_HAVE_YOU_READ =
        7,                   /* `rank` wants to hear when the aggregates that `text` lists are read; `digest`: its number */
    SMLT_TOKEN_HAVE_READ = 8 /* the answer to the question with the number `digest` */
} smlt_token_kind;

typedef struct {
    uint64_t step, digest; /* digest: of the call */
    uint64_t completed;    /* every collective up to this one is complete at `rank` */
    uint32_t chunk;
    uint16_t rank;
    uint8_t kind, status;
    const char *text; /* what `rank` called (first token to rank 0), or why it aborts; not terminated */
    size_t text_length;
} smlt_token;

size_t smlt_token_pack(char bytes[SMLT_TOKEN_MAX], const smlt_token *token);
/* The aggregates of a question: as many as fit in a token's text. */
#define SMLT_PLACE_BYTES 12
#define SMLT_PLACES_MAX (SMLT_TOKEN_TEXT_MAX / SMLT_PLACE_BYTES)

typedef struct {
    uint64_t step;
    uint32_t chunk;
} smlt_place;

void smlt_place_pack(char bytes[SMLT_PLACE_BYTES], smlt_place place);
smlt_place smlt_place_parse(const char *bytes);

int smlt_token_parse(const char *bytes, size_t length, smlt_token *token);

#endif

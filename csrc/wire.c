#include "wire.h"

#include <string.h>

#include "resp.h"

/* SMLT_KEY_MAX leaves room for three numbers of 20 digits behind the longest prefix. */
static char *append_text(char *at, const char *text) {
    size_t length = strlen(text);
    memcpy(at, text, length + 1);
    return at + length;
}

static char *append_number(char *at, uint64_t number) {
    at += resp_decimal(at, number);
    *at = 0;
    return at;
}

static char *append_chunk(char *at, const char *prefix, uint64_t step, const char *kind, uint32_t chunk) {
    at = append_number(append_text(at, prefix), step);
    return append_number(append_text(at, kind), chunk);
}

size_t smlt_key_contribution(char key[SMLT_KEY_MAX], const char *prefix, uint64_t step, uint32_t chunk, int rank) {
    char *end = append_chunk(key, prefix, step, ":u:", chunk);
    return (size_t)(append_number(append_text(end, ":"), (uint64_t)rank) - key);
}

size_t smlt_key_aggregate(char key[SMLT_KEY_MAX], const char *prefix, uint64_t step, uint32_t chunk) {
    return (size_t)(append_chunk(key, prefix, step, ":a:", chunk) - key);
}

size_t smlt_key_inbox(char key[SMLT_KEY_MAX], const char *prefix, int rank) {
    return (size_t)(append_number(append_text(append_text(key, prefix), "in:"), (uint64_t)rank) - key);
}

size_t smlt_key_outbox(char key[SMLT_KEY_MAX], const char *prefix) {
    return (size_t)(append_text(append_text(key, prefix), "agg") - key);
}

static void put(char *bytes, uint64_t value, int count) {
    for (int i = 0; i < count; i++) bytes[i] = (char)(value >> 8 * i & 0xff);
}

static uint64_t get(const char *bytes, int count) {
    uint64_t value = 0;
    for (int i = 0; i < count; i++) value |= (uint64_t)(unsigned char)bytes[i] << 8 * i;
    return value;
}

#define HEADER_MAGIC 0x01544c4d53ULL /* "SMLT", version 1 */

void smlt_header_pack(char bytes[SMLT_HEADER_BYTES], const smlt_header *header) {
    put(bytes, HEADER_MAGIC, 6);
    put(bytes + 6, header->rank, 2);
    put(bytes + 8, header->step, 8);
    put(bytes + 16, header->digest, 8);
    put(bytes + 24, header->chunk, 4);
    put(bytes + 28, header->elements, 4);
    put(bytes + 32, (uint32_t)header->exponent, 4);
    put(bytes + 36, 0, 4);
}

int smlt_header_parse(const char *bytes, size_t length, smlt_header *header) {
    if (length < SMLT_HEADER_BYTES || get(bytes, 6) != HEADER_MAGIC) return 0;
    header->rank = (uint16_t)get(bytes + 6, 2);
    header->step = get(bytes + 8, 8);
    header->digest = get(bytes + 16, 8);
    header->chunk = (uint32_t)get(bytes + 24, 4);
    header->elements = (uint32_t)get(bytes + 28, 4);
    header->exponent = (int32_t)get(bytes + 32, 4);
    return get(bytes + 36, 4) == 0 && header->exponent >= -2048 && header->exponent <= 2048;
}

#define TOKEN_VERSION 1

size_t smlt_token_pack(char bytes[SMLT_TOKEN_MAX], const smlt_token *token) {
    size_t text_length = token->text_length < SMLT_TOKEN_TEXT_MAX ? token->text_length : SMLT_TOKEN_TEXT_MAX;
    put(bytes, TOKEN_VERSION, 2);
    put(bytes + 2, token->kind, 1);
    put(bytes + 3, token->status, 1);
    put(bytes + 4, token->chunk, 4);
    put(bytes + 8, token->step, 8);
    put(bytes + 16, token->digest, 8);
    put(bytes + 24, token->completed, 8);
    put(bytes + 32, token->rank, 2);
    put(bytes + 34, text_length, 2);
    put(bytes + 36, 0, 4);
    if (text_length) memcpy(bytes + SMLT_TOKEN_BYTES, token->text, text_length);
    return SMLT_TOKEN_BYTES + text_length;
}

int smlt_token_parse(const char *bytes, size_t length, smlt_token *token) {
    if (length < SMLT_TOKEN_BYTES || length > SMLT_TOKEN_MAX || get(bytes, 2) != TOKEN_VERSION) return 0;
    token->kind = (uint8_t)get(bytes + 2, 1);
    token->status = (uint8_t)get(bytes + 3, 1);
    token->chunk = (uint32_t)get(bytes + 4, 4);
    token->step = get(bytes + 8, 8);
    token->digest = get(bytes + 16, 8);
    token->completed = get(bytes + 24, 8);
    token->rank = (uint16_t)get(bytes + 32, 2);
    token->text_length = get(bytes + 34, 2);
    token->text = bytes + SMLT_TOKEN_BYTES;
    return token->kind >= SMLT_TOKEN_CONTRIBUTION && token->kind <= SMLT_TOKEN_HAVE_READ && get(bytes + 36, 4) == 0 &&
           token->text_length == length - SMLT_TOKEN_BYTES;
}

void smlt_place_pack(char bytes[SMLT_PLACE_BYTES], smlt_place place) {
    put(bytes, place.step, 8);
    put(bytes + 8, place.chunk, 4);
}

smlt_place smlt_place_parse(const char *bytes) { return (smlt_place){get(bytes, 8), (uint32_t)get(bytes + 8, 4)}; }

/* Chunk headers and arrival tokens: any bytes parse or do not, and what parses packs to the same bytes. */
#include <stdlib.h>
#include <string.h>

#include "wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *bytes = malloc(size ? size : 1), packed[SMLT_TOKEN_MAX];
    smlt_header header;
    smlt_token token;
    if (!bytes) abort();
    memcpy(bytes, data, size); /* exact: the sanitizer sees one byte beyond */
    if (smlt_header_parse(bytes, size, &header)) {
        smlt_header_pack(packed, &header);
        if (size < SMLT_HEADER_BYTES || memcmp(packed, bytes, SMLT_HEADER_BYTES) != 0) abort();
    }
    if (smlt_token_parse(bytes, size, &token)) {
        if (size > SMLT_TOKEN_MAX || token.text_length > SMLT_TOKEN_TEXT_MAX) abort();
        if (smlt_token_pack(packed, &token) != size || memcmp(packed, bytes, size) != 0) abort();
    }
    free(bytes);
    return 0;
}

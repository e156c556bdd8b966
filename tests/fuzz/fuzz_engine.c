/* What a hostile or broken store could send to one worker: any bytes, on any connection, in any pieces. The engine must
 * neither touch foreign memory nor hang; it may fail, and must say so in words.
 *
 * Input: a byte that says what is under way and with how many nodes, then records: lane, length (2 bytes, little endian), bytes.
 * Lanes 4 to 6 are those of a second node. Lane 3 stands for the connections being lost; its length says what else: 1, the
 * first node has lost its data; 2, a newer generation has begun; 3, what is under way is completed nevertheless; 4, the
 * second node has lost its data. `record.py` makes such inputs out of real traffic.
 */
#include <stdlib.h>
#include <string.h>

#include "aggregate.h"

#define COUNT 100
#define LOST 3
#define RECONNECTS_MAX 8 /* each sends everything again, which is slow and teaches nothing new */

static const char *const PREFIXES[] = {"smlt:{fuzz.0}:1.hand:", "smlt:{fuzz.1}:1.hand:"};
static const smlt_chunk SHARDS[] = {{0, 0, 0, 0, 25, 0}, {0, 0, 25, 25, 25, 0}, {0, 1, 50, 50, 25, 0}, {0, 1, 75, 75, 25, 0}};
static const smlt_chunk WHOLE[] = {{0, 0, 0, 0, COUNT, 0}};

/* Everything a lane has to say is sent at once, in pieces of any size: replies can only come to commands. */
static void send_all(smlt_engine *engine) {
    struct iovec vectors[24];
    for (int lane = 0; lane < smlt_engine_lanes(engine); lane++)
        for (int count; (count = smlt_engine_output(engine, lane, vectors, 24)) > 0;)
            smlt_engine_sent(engine, lane, vectors[0].iov_len);
}

/* Returns 0 when the store refuses, for then these connections are over. */
static int receive(smlt_engine *engine, int lane, const uint8_t *bytes, size_t length) {
    while (length > 0 && smlt_engine_fatal(engine)->status == SMLT_OK) {
        size_t capacity;
        char *room = smlt_engine_input(engine, lane, &capacity);
        if (capacity == 0) abort(); /* it would wait for ever */
        size_t taken = length < capacity ? length : capacity;
        memcpy(room, bytes, taken);
        if (smlt_engine_received(engine, lane, taken) == SMLT_STORE_REFUSES) return 0;
        bytes += taken;
        length -= taken;
        send_all(engine);
    }
    return 1;
}

static void lose(smlt_engine *engine, size_t what, int nodes) {
    if (what == 1) smlt_engine_data_lost(engine, 0);
    if (what == 2) smlt_engine_fence(engine, 2);
    if (what == 3) smlt_engine_complete_fenced(engine, 1);
    if (what == 4 && nodes == 2) smlt_engine_data_lost(engine, 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    int codec = data[0] & 3, algorithm = (data[0] >> 2) % 3, rank = data[0] >> 4 & 1, collectives = 1 + (data[0] >> 5 & 1);
    int nodes = 1 + (data[0] >> 6 & 1);
    size_t window = data[0] >> 7 ? 3000 : 0; /* room for one chunk or two */
    smlt_engine *engine = smlt_engine_new(rank, 2, 1, nodes, PREFIXES, "smlt:{fuzz.0}:ctl", 60000, 1024, 4096, 16384, window);
    float *values = calloc(2 * COUNT, sizeof *values); /* exact: the sanitizer sees one byte beyond */
    if (!engine || !values) abort();
    for (int i = 0; i < COUNT; i++) values[i] = (float)i;
    const smlt_segment segment = {.dtype = SMLT_DTYPE_FLOAT32,
                                  .codec = codec,
                                  .source = values,
                                  .target = values + COUNT,
                                  .source_count = COUNT,
                                  .target_count = COUNT};
    const smlt_plan plan = {.algorithm = (smlt_algorithm)algorithm,
                            .digest = 7,
                            .description = "a fuzzed call",
                            .segments = &segment,
                            .segment_count = 1,
                            .chunks = algorithm == SMLT_ONE_SHOT ? WHOLE : SHARDS,
                            .chunk_count = algorithm == SMLT_ONE_SHOT ? 1 : 4};
    uint64_t step = 0;
    for (int i = 0; i < collectives; i++)
        if (smlt_engine_submit(engine, &plan, &step) != SMLT_OK) abort();
    send_all(engine);
    int reconnects = 0;
    for (size_t at = 1; at + 3 <= size;) {
        int kind = data[at] & 3, lane = kind + (nodes == 2 && data[at] & 4 ? SMLT_LANE_KINDS : 0);
        size_t length = data[at + 1] | (size_t)data[at + 2] << 8;
        at += 3;
        if (kind != LOST && length > size - at) length = size - at;
        if (kind == LOST || !receive(engine, lane, data + at, length)) {
            if (kind != LOST) at += length;
            if (++reconnects > RECONNECTS_MAX) break;
            if (kind == LOST) lose(engine, length, nodes);
            smlt_engine_reconnected(engine);
            send_all(engine);
            continue;
        }
        at += length;
    }
    const smlt_error *fatal = smlt_engine_fatal(engine);
    if (fatal->status != SMLT_OK && (!fatal->message[0] || strlen(fatal->message) >= SMLT_MESSAGE_MAX)) abort();
    smlt_error error;
    for (uint64_t each = 1; each <= step; each++) {
        smlt_engine_state(engine, each, &error);
        smlt_engine_retire(engine, each);
    }
    smlt_engine_leave(engine,
                      "0\x1f"
                      "left",
                      1);
    send_all(engine);
    smlt_engine_free(engine);
    free(values);
    return 0;
}

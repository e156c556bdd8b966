/* Which kernel, on which instruction set; how many bytes on the wire. */
#include "codec_paths.h"

static int always(void) { return 1; }
static void nothing(smlt_kernel *kernel, int dtype, int codec, int operation) {
    (void)kernel, (void)dtype, (void)codec, (void)operation;
}

/* Best last; a machine that has one has those before it. */
static const struct {
    const char *name;
    int (*supported)(void);
    void (*override)(smlt_kernel *kernel, int dtype, int codec, int operation);
} PATHS[] = {
    {"portable", always, nothing},
#if defined(__x86_64__)
    {"avx2", smlt_avx2_supported, smlt_avx2_override},
    {"avx512", smlt_avx512_supported, smlt_avx512_override},
#elif defined(__aarch64__)
    {"neon", smlt_neon_supported, smlt_neon_override},
#endif
};

static int current_path = -1; /* chosen at the first use */

const char *smlt_codec_path(int index) {
    if (index < 0 || index >= (int)(sizeof PATHS / sizeof *PATHS) || !PATHS[index].supported()) return NULL;
    return PATHS[index].name;
}

int smlt_codec_use(const char *path) {
    for (int i = 0; smlt_codec_path(i); i++)
        if (strcmp(path, PATHS[i].name) == 0) {
            current_path = i;
            return 1;
        }
    return 0;
}

static int path_in_use(void) {
    if (current_path < 0) {
        int best = 0;
        while (smlt_codec_path(best + 1)) best++;
        current_path = best;
    }
    return current_path;
}

const char *smlt_codec_current(void) { return PATHS[path_in_use()].name; }

int smlt_kernel_select(smlt_kernel *kernel, int dtype, int codec, int operation) {
    if (codec < 0 || codec >= SMLT_CODECS || operation < 0 || operation >= SMLT_OPERATIONS) return 0;
    if (codec == SMLT_RAW ? !smlt_raw_select(kernel, dtype, operation)
                          : !smlt_compressed_select(kernel, dtype, codec, operation))
        return 0;
    kernel->decode_streaming = kernel->decode;
    PATHS[path_in_use()].override(kernel, dtype, codec, operation);
    return 1;
}

size_t smlt_wire_size(const smlt_kernel *kernel, size_t n) {
    size_t blocks = n / kernel->block_elements + (n % kernel->block_elements != 0);
    return n * kernel->wire_bytes + blocks * kernel->block_header_bytes;
}

size_t smlt_wire_elements(const smlt_kernel *kernel, size_t bytes, size_t left) {
    size_t whole = bytes / (kernel->block_elements * kernel->wire_bytes + kernel->block_header_bytes);
    if (whole > left / kernel->block_elements) return left; /* more than there is: this also covers a partial block */
    size_t elements = whole * kernel->block_elements, rest = left - elements;
    if (rest < kernel->block_elements && bytes >= smlt_wire_size(kernel, left)) return left;
    return elements;
}

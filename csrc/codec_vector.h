/* The float32 kernels for vectors of any width: included once by each instruction set's file, which first defines
 *   TARGET, OVERRIDE    the target attribute; the name of the function that puts the kernels into the table
 *   vf, vi, LANES       vectors of LANES floats and of LANES int32_t
 *   load_floats         load_halves (fp16 to float), load_shorts, load_bytes (sign-extended), all from any address
 *   store_floats        stream_floats (to a vector's boundary, past the caches), store_halves, store_shorts (the low halves of
 * 2 vectors), store_bytes (the low bytes of 4) larger(a, b), where_greater(a, b, x, y) = a > b ? x : y, for vi; one_nan_each,
 * limited, rounded for vf What remains at the end of a chunk, and rare blocks, go to the scalar code of the portable path.
 */
#define KERNEL TARGET static
#define PART TARGET static inline __attribute__((always_inline))

/* What happens to a value from the wire; a constant wherever it is passed. STREAM: as DECODE, past the caches. */
typedef enum { DECODE, STREAM, FIRST, ADD } applied;

PART vi vector_bits(vf value) { return (vi)value; }

PART uint32_t largest_lane(vi values) {
    uint32_t lanes[LANES], result = 0;
    memcpy(lanes, &values, sizeof lanes);
    for (int k = 0; k < LANES; k++)
        if (lanes[k] > result) result = lanes[k];
    return result;
}

PART void apply(float *target, vf x, applied how) {
    if (how == DECODE)
        store_floats(target, x);
    else if (how == STREAM)
        stream_floats(target, x);
    else
        store_floats(target, one_nan_each(how == FIRST ? x : load_floats(target) + x));
}

PART void apply_one(float *target, size_t i, float x, applied how) {
    STORE(float, target, i, how <= STREAM ? x : one_nan(how == FIRST ? x : LOAD(float, target, i) + x));
}

/* Elements, of n, before the target's first vector boundary; all of them when there is none. */
PART size_t before_boundary(const float *target, size_t n) {
    size_t bytes = -(uintptr_t)target % sizeof(vf), head = bytes / sizeof *target;
    return bytes % sizeof *target || head > n ? n : head;
}

/* ---- fp16 ---- */

/* The bits of the largest finite magnitude of source + residual (NULL: none). */
KERNEL uint32_t largest_finite(const float *source, const float *residual, size_t n) {
    size_t whole = n - n % LANES;
    vi largest = {0};
    for (size_t i = 0; i < whole; i += LANES) { /* magnitudes are below 2^31: signed comparison orders them */
        vf value = residual ? load_floats(source + i) + load_floats(residual + i) : load_floats(source + i);
        vi magnitude = vector_bits(value) & MAGNITUDE;
        largest = larger(largest, where_greater((vi){0} + INFINITY_BITS, magnitude, magnitude, (vi){0}));
    }
    uint32_t result = largest_lane(largest);
    for (size_t i = whole; i < n; i++) {
        uint32_t magnitude = bits_of(LOAD(float, source, i) + (residual ? LOAD(float, residual, i) : 0)) & MAGNITUDE;
        if (magnitude < INFINITY_BITS && magnitude > result) result = magnitude;
    }
    return result;
}

PART void half_encode_with(uint16_t *halves, const float *values, size_t n, int exponent) {
    float scale = smlt_power_of_two(-exponent);
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) store_halves(halves + i, load_floats(values + i) * scale);
    for (; i < n; i++) STORE(uint16_t, halves, i, smlt_half_from_float(LOAD(float, values, i) * scale));
    if (exponent == SMLT_FP16_EXPONENT_MAX) smlt_fp16_saturate(halves, n);
}

#define PIECE 512

/* Encode a piece while the next one is searched: the memory works for the one, the units for the other. */
KERNEL uint32_t half_encode_piece(uint16_t *halves, const float *values, int exponent, const float *next) {
    float scale = smlt_power_of_two(-exponent);
    vi largest = {0};
    for (size_t i = 0; i < PIECE; i += LANES) {
        vi magnitude = vector_bits(load_floats(next + i)) & MAGNITUDE;
        largest = larger(largest, where_greater((vi){0} + INFINITY_BITS, magnitude, magnitude, (vi){0}));
        store_halves(halves + i, load_floats(values + i) * scale);
    }
    if (exponent == SMLT_FP16_EXPONENT_MAX) smlt_fp16_saturate(halves, PIECE);
    return largest_lane(largest);
}

/* A chunk does not stay in the inner caches until its exponent is known. So each piece is encoded with the exponent seen
 * so far; those before one that needs a larger exponent, few as a rule, are encoded again at the end. */
KERNEL int half_encode_seeking(uint16_t *halves, const float *values, size_t n) {
    size_t whole = n / PIECE * PIECE, outdated = 0;
    uint32_t largest = largest_finite(values + whole, NULL, n - whole);
    uint32_t seen = whole ? largest_finite(values, NULL, PIECE) : 0;
    int exponent = largest ? smlt_fp16_exponent(largest) : 0;
    for (size_t done = 0; done < whole; done += PIECE) {
        if (seen > largest) {
            int needed = smlt_fp16_exponent(seen);
            if (needed != exponent) outdated = done;
            exponent = needed;
            largest = seen;
        }
        size_t next = done + PIECE < whole ? done + PIECE : done;
        seen = half_encode_piece(halves + done, values + done, exponent, values + next);
    }
    half_encode_with(halves, values, outdated, exponent);
    half_encode_with(halves + whole, values + whole, n - whole, exponent);
    return exponent;
}

KERNEL int half_encode(void *wire, const void *source, size_t n, int exponent) {
    if (exponent == SMLT_CHOOSE_EXPONENT) return half_encode_seeking(wire, source, n);
    half_encode_with(wire, source, n, exponent);
    return exponent;
}

PART void half_apply(float *target, const void *wire, size_t n, float scale, applied how) {
    const uint16_t *halves = wire;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) apply(target + i, load_halves(halves + i) * scale, how);
    for (; i < n; i++) apply_one(target, i, smlt_float_from_half(LOAD(uint16_t, halves, i)) * scale, how);
}

KERNEL void half_decode(void *target, const void *wire, size_t n, int exponent) {
    half_apply(target, wire, n, smlt_power_of_two(exponent), DECODE);
}

KERNEL void half_stream(void *target, const void *wire, size_t n, int exponent) {
    size_t head = before_boundary(target, n);
    half_decode(target, wire, head, exponent);
    half_apply((float *)target + head, (const uint16_t *)wire + head, n - head, smlt_power_of_two(exponent), STREAM);
    stream_ends();
}

KERNEL void half_reduce(void *accumulator, const void *wire, size_t n, int exponent, int shift, int first) {
    float scale = smlt_power_of_two(exponent - shift);
    if (first)
        half_apply(accumulator, wire, n, scale, FIRST);
    else
        half_apply(accumulator, wire, n, scale, ADD);
}

/* ---- bf16 ---- */

PART vi bf16_from_floats(vf values) {
    vi bits = vector_bits(values), magnitude = bits & MAGNITUDE, infinity = (vi){0} + INFINITY_BITS;
    vi finite = where_greater(magnitude, (vi){0} + 0x7f7f7fff, (vi){0} + 0x7f7f0000, magnitude); /* would round to Inf */
    vi nearest = finite + 0x7fff + (finite >> 16 & 1);
    vi passed = where_greater(magnitude, infinity, magnitude | 0x400000, magnitude);
    return (where_greater(infinity, magnitude, nearest, passed) >> 16) | (bits >> 16 & 0x8000);
}

KERNEL int bf16_encode(void *wire, const void *source, size_t n, int exponent) {
    const float *values = source;
    uint16_t *shorts = wire;
    (void)exponent;
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        store_shorts(shorts + i, bf16_from_floats(load_floats(values + i)), bf16_from_floats(load_floats(values + i + LANES)));
    for (; i < n; i++) STORE(uint16_t, shorts, i, smlt_bf16_from_float(LOAD(float, values, i)));
    return 0;
}

PART void bf16_apply(float *target, const void *wire, size_t n, float scale, applied how) {
    const uint16_t *shorts = wire;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf x = (vf)(load_shorts(shorts + i) << 16);
        apply(target + i, how <= STREAM ? x : x * scale, how);
    }
    for (; i < n; i++) {
        float x = smlt_float_from_bf16(LOAD(uint16_t, shorts, i));
        apply_one(target, i, how <= STREAM ? x : x * scale, how);
    }
}

KERNEL void bf16_decode(void *target, const void *wire, size_t n, int exponent) {
    (void)exponent;
    bf16_apply(target, wire, n, 1.0f, DECODE);
}

KERNEL void bf16_stream(void *target, const void *wire, size_t n, int exponent) {
    size_t head = before_boundary(target, n);
    bf16_decode(target, wire, head, exponent);
    bf16_apply((float *)target + head, (const uint16_t *)wire + head, n - head, 1.0f, STREAM);
    stream_ends();
}

KERNEL void bf16_reduce(void *accumulator, const void *wire, size_t n, int exponent, int shift, int first) {
    float scale = smlt_power_of_two(-shift);
    (void)exponent;
    if (first)
        bf16_apply(accumulator, wire, n, scale, FIRST);
    else
        bf16_apply(accumulator, wire, n, scale, ADD);
}

/* ---- int8 ---- */

#define BLOCK SMLT_INT8_BLOCK
#define BLOCK_BYTES (SMLT_INT8_HEADER + BLOCK)

/* While a block is encoded the memory would idle. Asking for what lies behind the array is harmless. */
PART void read_ahead(const float *values) {
    __builtin_prefetch((const void *)((uintptr_t)values + 4 * BLOCK * sizeof *values));
}

PART void int8_encode_block(char *wire, const float *values, int keep_scale) {
    vi largest = {0};
    for (size_t i = 0; i < BLOCK; i += LANES) {
        read_ahead(values + i);
        largest = larger(largest, vector_bits(load_floats(values + i)) & MAGNITUDE);
    }
    uint32_t largest_bits = largest_lane(largest);
    uint16_t header = keep_scale ? LOAD(uint16_t, wire, 0) : smlt_int8_header(largest_bits, 0);
    if (largest_bits >= INFINITY_BITS || header & SMLT_INT8_NOT_FINITE) {
        smlt_int8_encode_block(wire, values, BLOCK, keep_scale);
        return;
    }
    STORE(uint16_t, wire, 0, header);
    float inverse = smlt_int8_inverse(header);
    for (size_t i = 0; i < BLOCK; i += 4 * LANES) {
        vi codes[4];
        for (int k = 0; k < 4; k++) codes[k] = rounded(limited(load_floats(values + i + k * LANES) * inverse, 127.0f));
        store_bytes(wire + SMLT_INT8_HEADER + i, codes[0], codes[1], codes[2], codes[3]);
    }
}

KERNEL int int8_encode(void *wire, const void *source, size_t n, int exponent) {
    const float *values = source;
    int keep_scales = exponent == SMLT_KEEP_SCALES;
    char *block = wire;
    for (; n >= BLOCK; n -= BLOCK, block += BLOCK_BYTES, values += BLOCK) int8_encode_block(block, values, keep_scales);
    if (n) smlt_int8_encode_block(block, values, n, keep_scales);
    return 0;
}

/* A block begins at any address: its vectors are put together anew. */
PART void stream_block(float *target, const float *values) {
    size_t head = before_boundary(target, BLOCK), i = head;
    memcpy(target, values, head * sizeof *values);
    for (; i + LANES <= BLOCK; i += LANES) stream_floats(target + i, load_floats(values + i));
    memcpy(target + i, values + i, (BLOCK - i) * sizeof *values);
}

PART void int8_apply(float *target, const void *wire, size_t n, int shift, applied how) {
    const char *block = wire;
    float power = smlt_power_of_two(-shift);
    for (; n; block += BLOCK_BYTES, target += BLOCK) {
        uint16_t header = LOAD(uint16_t, block, 0);
        float scale = smlt_float_from_bf16(header) * power, values[BLOCK];
        if (n >= BLOCK && !(header & SMLT_INT8_NOT_FINITE)) {
            float *to = how == STREAM ? values : target;
            for (size_t i = 0; i < BLOCK; i += LANES)
                apply(to + i, __builtin_convertvector(load_bytes(block + SMLT_INT8_HEADER + i), vf) * scale,
                      how == STREAM ? DECODE : how);
            if (how == STREAM) stream_block(target, values);
            n -= BLOCK;
            continue;
        }
        size_t count = n < BLOCK ? n : BLOCK;
        smlt_int8_expand_block(values, block, count, shift);
        for (size_t i = 0; i < count; i++) apply_one(target, i, values[i], how);
        n -= count;
    }
}

KERNEL void int8_decode(void *target, const void *wire, size_t n, int exponent) {
    (void)exponent;
    int8_apply(target, wire, n, 0, DECODE);
}

KERNEL void int8_stream(void *target, const void *wire, size_t n, int exponent) {
    (void)exponent;
    int8_apply(target, wire, n, 0, STREAM);
    stream_ends();
}

KERNEL void int8_reduce(void *accumulator, const void *wire, size_t n, int exponent, int shift, int first) {
    (void)exponent;
    if (first)
        int8_apply(accumulator, wire, n, shift, FIRST);
    else
        int8_apply(accumulator, wire, n, shift, ADD);
}

/* ---- raw ---- */

PART void raw_apply(float *sums, const float *values, size_t n, float scale, applied how) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        apply(sums + i, how <= STREAM ? load_floats(values + i) : load_floats(values + i) * scale, how);
    for (; i < n; i++) apply_one(sums, i, how <= STREAM ? LOAD(float, values, i) : LOAD(float, values, i) * scale, how);
}

KERNEL void raw_stream(void *target, const void *wire, size_t n, int exponent) {
    const float *values = wire;
    size_t head = before_boundary(target, n);
    (void)exponent;
    memcpy(target, wire, head * sizeof *values);
    raw_apply((float *)target + head, values + head, n - head, 1.0f, STREAM);
    stream_ends();
}

KERNEL void raw_reduce(void *accumulator, const void *source, size_t n, int exponent, int shift, int first) {
    float scale = smlt_power_of_two(-shift);
    (void)exponent;
    if (first)
        raw_apply(accumulator, source, n, scale, FIRST);
    else
        raw_apply(accumulator, source, n, scale, ADD);
}

KERNEL int finish_mean(void *accumulator, size_t n, int world_size, int shift) {
    float *sums = accumulator, divisor = (float)world_size, scale = smlt_power_of_two(shift);
    vi largest = {0};
    size_t i = 0;
    int not_finite = 0;
    for (; i + LANES <= n; i += LANES) {
        vf mean = load_floats(sums + i) / divisor * scale;
        largest = larger(largest, vector_bits(mean) & MAGNITUDE);
        store_floats(sums + i, mean);
    }
    for (; i < n; i++) {
        float mean = LOAD(float, sums, i) / divisor * scale;
        not_finite |= !(mean - mean == 0);
        STORE(float, sums, i, mean);
    }
    return not_finite || largest_lane(largest) >= INFINITY_BITS;
}

/* ---- error feedback: the value is encoded, decoded and compared in registers; what is left over, by the portable path ---- */

PART vf compensated(const float *source, const float *residual, size_t i) {
    return one_nan_each(load_floats(source + i) + (residual ? load_floats(residual + i) : (vf){0}));
}

PART void keep_lost(float *next_residual, vf value, vf decoded) {
    vi lost = vector_bits(value - decoded);
    store_floats(next_residual, (vf)where_greater((vi){0} + INFINITY_BITS, lost & MAGNITUDE, lost, (vi){0}));
}

KERNEL int half_feedback(void *wire, const void *source, const void *residual, void *next_residual, size_t n, int exponent) {
    const float *values = source, *kept = residual;
    float *next = next_residual;
    uint16_t *halves = wire;
    if (exponent == SMLT_CHOOSE_EXPONENT) {
        uint32_t largest = largest_finite(values, kept, n);
        exponent = largest ? smlt_fp16_exponent(largest) : 0;
    }
    if (exponent == SMLT_FP16_EXPONENT_MAX) /* some halves are not rounded to the nearest */
        return smlt_half_feedback_float(wire, source, residual, next_residual, n, exponent);
    float inverse = smlt_power_of_two(-exponent), scale = smlt_power_of_two(exponent);
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf value = compensated(values, kept, i);
        store_halves(halves + i, value * inverse);
        keep_lost(next + i, value, load_halves(halves + i) * scale);
    }
    if (i < n) smlt_half_feedback_float(halves + i, values + i, kept ? kept + i : NULL, next + i, n - i, exponent);
    return exponent;
}

KERNEL int bf16_feedback(void *wire, const void *source, const void *residual, void *next_residual, size_t n, int exponent) {
    const float *values = source, *kept = residual;
    float *next = next_residual;
    uint16_t *shorts = wire;
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        vf one = compensated(values, kept, i), two = compensated(values, kept, i + LANES);
        vi coded_one = bf16_from_floats(one), coded_two = bf16_from_floats(two);
        store_shorts(shorts + i, coded_one, coded_two);
        keep_lost(next + i, one, (vf)(coded_one << 16));
        keep_lost(next + i + LANES, two, (vf)(coded_two << 16));
    }
    if (i < n) smlt_bf16_feedback_float(shorts + i, values + i, kept ? kept + i : NULL, next + i, n - i, exponent);
    return 0;
}

KERNEL int int8_feedback(void *wire, const void *source, const void *residual, void *next_residual, size_t n, int exponent) {
    const float *values = source, *kept = residual;
    float *next = next_residual, sums[BLOCK];
    char *block = wire;
    for (; n >= BLOCK; n -= BLOCK, block += BLOCK_BYTES, values += BLOCK, next += BLOCK) {
        for (size_t i = 0; i < BLOCK; i += LANES) store_floats(sums + i, compensated(values, kept, i));
        int8_encode_block(block, sums, exponent == SMLT_KEEP_SCALES);
        uint16_t header = LOAD(uint16_t, block, 0);
        if (header & SMLT_INT8_NOT_FINITE) {
            float decoded[BLOCK];
            smlt_int8_expand_block(decoded, block, BLOCK, 0);
            for (size_t i = 0; i < BLOCK; i += LANES) keep_lost(next + i, load_floats(sums + i), load_floats(decoded + i));
        } else {
            float scale = smlt_float_from_bf16(header);
            for (size_t i = 0; i < BLOCK; i += LANES) {
                vi codes = load_bytes(block + SMLT_INT8_HEADER + i);
                keep_lost(next + i, load_floats(sums + i), __builtin_convertvector(codes, vf) * scale);
            }
        }
        kept = kept ? kept + BLOCK : NULL;
    }
    if (n) smlt_int8_feedback_float(block, values, kept, next, n, exponent);
    return 0;
}

void OVERRIDE(smlt_kernel *kernel, int dtype, int codec, int operation) {
    static const struct {
        int (*encode)(void *, const void *, size_t, int);
        void (*decode)(void *, const void *, size_t, int), (*stream)(void *, const void *, size_t, int);
        void (*reduce)(void *, const void *, size_t, int, int, int);
        int (*encode_feedback)(void *, const void *, const void *, void *, size_t, int);
    } kernels[SMLT_CODECS] = {
        [SMLT_RAW] = {NULL, NULL, raw_stream, raw_reduce, NULL},
        [SMLT_FP16] = {half_encode, half_decode, half_stream, half_reduce, half_feedback},
        [SMLT_BF16] = {bf16_encode, bf16_decode, bf16_stream, bf16_reduce, bf16_feedback},
        [SMLT_INT8] = {int8_encode, int8_decode, int8_stream, int8_reduce, int8_feedback},
    };
    if (dtype != SMLT_DTYPE_FLOAT32) return;
    kernel->decode_streaming = kernels[codec].stream;
    if (codec != SMLT_RAW) {
        kernel->encode = kernels[codec].encode;
        kernel->decode = kernels[codec].decode;
        kernel->encode_feedback = kernels[codec].encode_feedback;
    }
    if (operation == SMLT_SUM || operation == SMLT_MEAN) {
        kernel->reduce = kernels[codec].reduce;
        kernel->reduce_own = raw_reduce;
    }
    if (operation == SMLT_MEAN) kernel->finish = finish_mean;
}

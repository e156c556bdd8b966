/* Sleeping on a word in shared memory until another process changes it. */
#ifndef SMLT_SHARED_WAIT_H
#define SMLT_SHARED_WAIT_H

#include <stdatomic.h>
#include <stdint.h>

/* Returns when `*word` is no longer `seen`, or somebody has called `smlt_wake_all`, or after `timeout_ms`; perhaps sooner. */
void smlt_wait_on(_Atomic uint32_t *word, uint32_t seen, int timeout_ms);
void smlt_wake_all(_Atomic uint32_t *word);
/* Tell the processor that this is a loop that waits. */
void smlt_relax(void);
int64_t smlt_monotonic_us(void);

#endif

/* Who drives an engine: the thread that waits for a collective, or a thread of its own while nobody waits.
 *
 * One lock guards the engine; there is one driver at a time, who holds the lock but while it polls. A thread that calls a
 * blocking collective drives itself, so that a small collective costs no switch to another thread. For asynchronous
 * ones smlt_progress_start adds a thread that drives whenever a collective is unfinished and nobody else does.
 */
#ifndef SMLT_PROGRESS_H
#define SMLT_PROGRESS_H

#include "aggregate.h"

typedef enum {
    SMLT_RUN_ENDED, /* the collective has ended, the engine failed, or (flush) everything is sent and answered */
    SMLT_RUN_AGAIN, /* the time is over: look after signals and deadlines, then come back */
    SMLT_RUN_LOST   /* the connections are gone: open new ones, then smlt_progress_connected */
} smlt_run_result;

typedef struct smlt_progress smlt_progress;

/* The engine stays the caller's. NULL when there is no memory or no pipe to be had. */
smlt_progress *smlt_progress_new(smlt_engine *engine);
void smlt_progress_free(smlt_progress *progress); /* ends the thread */

/* Around every call to the engine. A waiting thread is let in when the driver next polls. */
void smlt_progress_lock(smlt_progress *progress);
void smlt_progress_unlock(smlt_progress *progress);
void smlt_progress_submitted(smlt_progress *progress); /* with the lock held: the driver has something new to do */

/* One non-blocking socket a lane; NULL when another transport (TLS) moves the bytes. */
void smlt_progress_connected(smlt_progress *progress, const int *fds);

/* The connections are as good as lost: nobody uses their descriptors when this returns, so that they may be closed. */
void smlt_progress_disconnect(smlt_progress *progress);
int smlt_progress_is_lost(smlt_progress *progress);

int smlt_progress_start(smlt_progress *progress); /* 0 when there is no thread to be had */
void smlt_progress_stop(smlt_progress *progress); /* for good */

/* Drive, or wait for whoever drives, for at most `timeout_ms`. Not in a child process: the locks may be held for ever. */
smlt_run_result smlt_progress_run(smlt_progress *progress, uint64_t step, int timeout_ms, int flush);

/* For another transport: become the driver (0: someone is), and no longer. The driver polls smlt_progress_wake_fd too. */
int smlt_progress_take(smlt_progress *progress);
void smlt_progress_release(smlt_progress *progress, int connection_lost);
int smlt_progress_wake_fd(const smlt_progress *progress);
void smlt_progress_drain(smlt_progress *progress);
/* Wait for at most `timeout_ms` until there is an unfinished collective and no driver. 1 when that is so. */
int smlt_progress_wait_for_work(smlt_progress *progress, int timeout_ms);

#endif

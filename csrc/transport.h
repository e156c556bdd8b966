/* Non-blocking sockets under an engine: writev out of its buffers, receive into them, poll in between. */
#ifndef SMLT_TRANSPORT_H
#define SMLT_TRANSPORT_H

#include "aggregate.h"

typedef enum {
    SMLT_TRANSPORT_ENDED, /* a collective has ended, the engine failed, or (flush) everything is sent and answered */
    SMLT_TRANSPORT_AGAIN, /* the time is over: look after signals and deadlines, then come back */
    SMLT_TRANSPORT_LOST   /* a connection is gone: `lost_lane`, `lost_errno` (0: the store closed it) */
} smlt_transport_result;

/* Move bytes for at most `timeout_ms`. `fds`: one non-blocking socket a lane. With `flush`, until nothing is left to say. */
smlt_transport_result smlt_transport_run(smlt_engine *engine, const int fds[SMLT_LANES], int timeout_ms, int flush,
                                         int *lost_lane, int *lost_errno);

#endif

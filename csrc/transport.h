/* Non-blocking sockets under an engine: writev out of its buffers, receive into them. Who calls it, and when: progress.h. */
#ifndef SMLT_TRANSPORT_H
#define SMLT_TRANSPORT_H

#include <poll.h>

#include "aggregate.h"

typedef enum { SMLT_IDLE, SMLT_MOVED, SMLT_CONNECTION_LOST } smlt_exchange_result;

/* Send and receive what can be moved without waiting. `polled` (one entry for each lane of the engine) holds what poll said
 * before and receives what to wait for next. When a connection is lost: `*lost_errno`, 0 when the store closed it. */
smlt_exchange_result smlt_transport_exchange(smlt_engine *engine, struct pollfd *polled, int *lost_lane, int *lost_errno);

#endif

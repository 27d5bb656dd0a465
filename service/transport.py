"""The limits of a connection and its calls, each set on purpose; `OPTIONS` is what gRPC is told of them."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 4 << 20
"""Largest message that is read. A prompt that fills a context of 262,144 tokens is about 1 MB, as text or as ids."""

HARD_MESSAGE_BYTES = MAX_MESSAGE_BYTES + (1 << 20)
"""Up to here an oversized message is read and refused with its details; beyond, gRPC refuses it by its header alone,
with a bare RESOURCE_EXHAUSTED that tells both sizes, so that nobody makes the server hold more."""

WINDOW_BYTES = 64 << 10
"""What may be on its way on a call that nobody reads yet. gRPC would make it 16 MB as soon as a client sends fast; a
message that is being read has all the room that it needs in any case."""

MAX_CONNECTION_AGE = 3600
"""Seconds after which a connection takes no new calls and its client opens another one: load spreads over new servers,
and a certificate that was replaced or withdrawn is looked at again. Clients of gRPC notice nothing of it."""

CONNECTION_AGE_GRACE = 3600
"""Seconds that calls may go on after that, so that a stream may always last an hour; what is longer must be resumed."""

MAX_CONNECTION_IDLE = 900
"""Seconds without a call after which a connection is closed; the next call opens another one."""

HANDSHAKE_TIMEOUT = 10
"""Seconds for TLS and HTTP/2 to begin; who connects and says nothing holds a socket no longer than that."""

OPTIONS: tuple[tuple[str, int], ...] = (
    # Two servers on one port would take turns at random, where the second should say that the port is taken.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", HARD_MESSAGE_BYTES),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.http2.bdp_probe", 0),
    # Room for trace headers and credentials; above the soft limit gRPC refuses some requests, above the hard one all.
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    # One connection cannot take all of the queue; more calls wait in the client.
    ("grpc.max_concurrent_streams", 128),
    ("grpc.max_connection_age_ms", MAX_CONNECTION_AGE * 1000),
    ("grpc.max_connection_age_grace_ms", CONNECTION_AGE_GRACE * 1000),
    ("grpc.max_connection_idle_ms", MAX_CONNECTION_IDLE * 1000),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT * 1000),
    # A client that vanished without a word is noticed within 40 s, and its generation ends.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # An idle stream is normal (no drafts, or a conversation between turns): clients may ping every 10 s, with or
    # without calls, and are not sent away for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # What is written ahead of the client is stale when it is read: a small buffer leaves drafts in the mailbox, where
    # newer ones replace them.
    ("grpc.http2.write_buffer_size", 4 << 10),
)

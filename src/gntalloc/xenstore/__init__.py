"""xenstore, the shared tree in which domains find each other: a client, and what a server shares with it.

    wire        messages as bytes: a header, NUL rules, limits. Sans-I/O
    path        what a path may be, and permission entries
    errors      what the daemon's answers become
    connection  one connection for many threads: who reads, who waits
    client      Store, Transaction
    watch       Watch: be told of changes
    daemon/     xenstored, the half that answers

This module imports none of them, so that importing one does not import all.
"""

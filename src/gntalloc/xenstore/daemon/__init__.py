"""xenstored, the daemon's half of xenstore: what the C daemon of Xen 4.17 does, as pure state. Sans-I/O.

    limits        quotas, and what a refusal is
    arguments     the strings and numbers in a request, read as C reads them
    permissions   who may do what with a node
    tree          nodes, and names of nodes
    domains       the domains that the daemon knows, and what each has in use
    transactions  what one has seen and changed
    session       one connection: its watches, its transactions, what it has not read yet
    watches       who is told of what
    view          the tree as one request sees it
    control       the administrator's commands
    server        requests to answers

Whoever serves the sockets feeds `Server.handle` with messages and sends what is in `Session.outbox`.
"""

"""Be xenstored, the daemon's half of xenstore: as the C daemon of Xen 4.17, but as pure state. Sans-I/O.

    limits        define quotas and refusals
    arguments     read the strings and numbers in a request, as C reads them
    permissions   decide what a domain may do with a node
    tree          keep nodes, and check their names
    domains       keep the domains that the daemon knows, and count what each has in use
    keeper        keep the common tree with its books
    transactions  keep what a transaction has seen and changed
    commits       put a transaction's changes into the common tree
    changes       hold changes of which watches are told
    session       keep one connection: its watches, its transactions, its unread messages
    watches       find the watches that an event fires, and fire them in pieces
    view          show the tree as one request sees it
    control       carry out the administrator's commands
    request       hold a request as its handlers see it
    nodes         serve the requests about nodes
    server        turn requests into answers

The code that serves the sockets feeds `Daemon.begin` with messages and sends the messages of `Session.outbox`.
"""

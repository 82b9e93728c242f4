"""What `gntalloc demo` shows, and nothing else depends on.

stream    a file of any size from one domain to another, through pages the sender granted
grantee   the process at the other end of the demo
between   the stream between two domains of a real Xen
scenes    what happens when a peer attacks, lingers or is killed, and what the kernel answers
"""

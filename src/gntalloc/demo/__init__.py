"""What `gntalloc demo` shows, and nothing else depends on.

stream    a file of any size from one domain to another, through pages the sender granted
grantee   the process at the other end of the demo
scenes    what happens when a peer attacks, lingers or is killed, and what the kernel answers
"""

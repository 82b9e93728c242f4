"""Show what grants do, for `gntalloc demo`. Nothing else depends on this package.

stream    send a file of any size from one domain to another, through pages that the sender granted
grantee   be the process at the other end of the demo
between   run the stream between two domains of a real Xen
scenes    show how the kernel answers when a peer attacks, lingers or is killed
"""

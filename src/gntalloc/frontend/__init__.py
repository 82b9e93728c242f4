"""Drivers for a Xen device, in a program: a ring of requests and responses, and a handshake in xenstore.

ring        requests one way, responses the other, in one page; a peer that lies is found. Pure
xenbus      the states of both ends as a table; waiting for the other; what it complains of
nodes       what a toolstack writes so that two ends find each other
blkif       the numbers and structs of a block device. Pure
requests    blkfront's core: pages, requests in flight, responses. Pure
link        a frontend's ring, port and handshake, whatever the device is
session     a disk and its backend: handshake, requests, checks. What the faces are made of
waiting     how the threads that use a disk wait for its backend
blkfront    BlockDevice: a disk that a backend serves, in calls that wait
aio         Disk: the same, for asyncio
nbd         NbdServer: a disk as a network block device
nbdpace     what waits for its clients is bounded
handshake   what an NBD client and a server agree on first
nbdif       the numbers and structs of the NBD protocol. Pure
extents     which parts of a disk hold data: an extension between our own two ends
grantio     a backend's way to granted pages: mapped, mapped for good, or copied
blkback     Backend: serves a file as a disk
image       the file behind it: its format, its size
imagelock   the locks on it, which QEMU respects too
"""

"""The process that plays the machine: the only owner of truth. Control goes through it; data never does.

process      the entry point of the child process
server       puts the parts together, makes and ends domains, runs the loop
orders       what the machine's owner can order
control      the control channel, over which orders come
connection   one program's call channel
supervision  what a run's supervisor asks beyond its own calls, and what it is handed
syscalls     system calls of a run that the machine serves itself
store        connections to xenstore
doors        the sockets at which programs knock, and who may come in
lifetime     domains and machines that last as long as the runs in them
homes        homes of open files: what programs hold of the machine
home         one of them
waits        sockets that tell when pages are released
placements   maps that were given out, until their program says where it has them
faults       faults that a test asks for
stream       a program's messages in, the machine's replies out
turns        which speaker is served next, how much of it, and which has to wait
loop         waits for descriptors; knows nobody
descriptors  descriptors that programs send: taken in, and let go of without waiting
machine      domains, their drivers and open files; what the kernel says of mappings is taken in here
disturbed    event channels that are late or repeat themselves, for faults
toolstack    the nodes that a domain finds in xenstore
"""

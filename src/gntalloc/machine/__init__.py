"""Be the machine: a process that alone knows which domain has which page. Control goes through it; data never does.

process      enter the child process
server       put the parts together, make and end domains, run the loop
orders       define the orders of the machine's owner
control      take orders over the control channel
connection   serve one program's call channel
supervision  serve a run's supervisor beyond its own calls, and hand calls over to it
syscalls     serve system calls of a run in the machine itself
store        serve connections to xenstore
doors        listen on the machine's sockets, and decide which programs may come in
lifetime     let domains and machines last as long as the runs in them
homes        keep the homes of all open files
home         be one home: a program's hold on an open file, and the machine's end of it
waits        tell programs, by sockets, when their pages are released
quotas       share out what the machine has only so much of
faults       cause the faults that a test asks for
stream       move a program's messages in and the machine's replies out
turns        choose which speaker is served next, how much of it, and which has to wait
speaker      say what is asked of whatever sends messages to be served
accounts     charge each domain for the time that it takes, and say which is next
loop         wait for descriptors
machine      keep domains, their drivers and open files, and take in what the kernel says of mappings
disturbed    delay or repeat events of event channels, for faults
logbook      write the log without waiting, and only so much of it
toolstack    make the nodes that a domain finds in xenstore
"""

"""Take, serve and answer the system calls of programs that do not know this package.

listener    take a call, answer it, put a descriptor into its caller
threads     find a caller's process, and the file of its descriptor
memory      read and write the memory of a program
arguments   choose the memory that goes along with an ioctl
serving     serve each kind of call

Two processes serve so: a run's supervisor, and, for programs of its own user, the machine itself.
"""

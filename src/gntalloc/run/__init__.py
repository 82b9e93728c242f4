"""Unmodified programs: `gntalloc run -- PROGRAM` serves /dev/xen to programs that were never told about us.

filter      which system calls the kernel brings to us, and how it is told so
listener    those calls: take one, answer it, put a descriptor into its caller
memory      the memory of a program
arguments   which memory goes along with which ioctl
machine     the machine as the supervisor speaks to it: open files, by their homes
injector    an mmap of ours in place of the caller's
supervisor  serves the calls of one `run`, in a process of its own
launcher    starts the program, and is it for whoever called us: signals, stops, exit status
joining     find the machine, or start it
trial       what all this needs of the kernel, tried
"""

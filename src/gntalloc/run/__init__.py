"""Unmodified programs: `gntalloc run -- PROGRAM` serves /dev/xen to programs that were never told about us.

filter      which system calls the kernel brings to us, and how it is told so
machine     the machine as the supervisor speaks to it: open files, by their homes
injector    an mmap of ours in place of the caller's
supervisor  has the calls of one `run` served, by the machine or itself (gntalloc.syscalls)
process     the supervisor's process
launcher    starts the program, and is it for whoever called us: signals, stops, exit status
joining     find the machine, or start it
program     starting it under the filter
trial       what all this needs of the kernel, tried
"""

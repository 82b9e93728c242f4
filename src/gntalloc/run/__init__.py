"""Unmodified programs: `gntalloc run -- PROGRAM` serves /dev/xen to programs that were never told about us.

filter      which system calls the kernel brings to us, and how it is told so
files       the machine as the supervisor speaks to it: open files, by their homes
injector    an mmap of ours in place of the caller's
supervisor  has the calls of one `run` served, by the machine or itself (gntalloc.syscalls)
process     the supervisor's process
launcher    starts the program, and is it for whoever called us: signals, stops, exit status
join        finds the machine, or starts it
program     starting it under the filter
debugged    maps of programs that a debugger has
explain     why calls failed, for `run -v`
household   a fresh machine around a command
pair        programs in several domains of one machine, the server first
children    processes that are left to this one
selftest    what all this needs of the kernel, tried
"""

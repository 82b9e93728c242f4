"""Run unmodified programs: `gntalloc run -- PROGRAM` serves /dev/xen to programs that do not know this package.

filter      tell the kernel which system calls to bring to the supervisor
files       speak to the machine for the supervisor: open files, known by their homes
injector    make a map in place of the caller's
supervisor  have the calls of one `run` served, by the machine or here (gntalloc.syscalls)
process     be the supervisor's process
launcher    start the program, and stand for it towards the caller: signals, stops, exit status
join        find the machine, or start it
program     start the program under the filter
debugged    make maps for programs that a debugger has
explain     say why calls failed, for `run -v`
household   keep a fresh machine around a command
pair        run programs in several domains of one machine, the server first
children    collect processes that are left to this one
selftest    try what all this needs of the kernel
"""

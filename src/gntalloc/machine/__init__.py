"""The process that plays the machine: the only owner of truth. Control goes through it; data never does.

machine     domains, their drivers, open files; what the kernel says of mappings is taken in here
server      the loop: sockets, homes, news of frames
connection  one program's call channel
home        what a program holds as an open file, and the machine's end of it
control     listing, limits, making and ending domains
process     the entry point of the child process
"""

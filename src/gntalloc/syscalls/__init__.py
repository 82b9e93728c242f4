"""System calls of programs that were never told about us: they are brought here, served and answered.

listener    take a call, answer it, put a descriptor into its caller
threads     who the caller is, and which file its descriptor is
memory      the memory of a program
arguments   which memory goes along with which ioctl
serving     what each call means

Two processes serve so: a run's supervisor, and, for programs of its own user, the machine itself.
"""

"""Define the protocol between a program and the machine. Sans-I/O: bytes in, bytes out.

stream    frames on a stream socket: header, message, reply
messages  each kind of message, a named tuple; docs/wire.md is made from it
form      how the fields of a message become bytes
memory    stretches of a caller's memory that travel with a message
token     what a program writes to a home, to show that it holds it
"""

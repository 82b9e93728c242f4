"""The protocol between a program and the machine. Sans-I/O: bytes in, bytes out.

stream    frames on a stream socket: header, message, reply
messages  each kind of message, with its own encode and decode; docs/wire.md is made from it
memory    stretches of a caller's memory that travel with a message
"""

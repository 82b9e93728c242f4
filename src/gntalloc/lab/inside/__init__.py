"""Run inside a domain: start commands there, and carry files and output.

This folder is copied into every domain as a package of its own, without the rest of this project. So it imports only
the standard library of the Python in the images, and itself by relative names.

commands  start commands, and carry their output
guests    start and find guests, in dom0
link      hold the line to the computer outside
messages  encode the messages on it
"""

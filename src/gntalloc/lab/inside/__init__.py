"""What runs inside a domain: it starts commands there and carries files and output.

This folder is copied into every domain as a package of its own, next to nothing else of this project.
So it imports only the standard library of the Python in the images, and itself by relative names.

commands  starts commands, and carries their output
guests    starts and finds guests, in dom0
link      the line to the computer outside
messages  what travels on it
"""

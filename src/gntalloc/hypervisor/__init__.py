"""What the hypervisor keeps. Pure state: no I/O, no clock, no threads.

grants   a domain's grant table
ports    event channels
domains  all of them, found by domid
"""

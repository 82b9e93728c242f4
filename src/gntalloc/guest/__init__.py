"""What a program inside a domain uses.

domain      BareDomain: share, map
peers       what every call that takes a domain or a count accepts
pages       shared and mapped pages
quotas      how much of a program each peer has
grant       Grant: what to tell a peer, as a value and as text
events      event channels
devices/    the two providers of /dev/xen: the machine, and a real kernel
connection  messages to the machine
showing     show the machine which of its open files a descriptor is
control     orders to the machine, for its owner
absence     why nobody answers there
books       what a machine tells its owner: grants, files, statistics
"""

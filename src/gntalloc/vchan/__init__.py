"""vchan: a byte channel between two domains, over granted pages. libxenvchan's wire format, byte for byte.

layout      the shared page: where what lies, which sizes go together. Pure
extension   what two ends of this package agree on beside it, in bytes that libxenvchan does not use. Pure
ring        indexes, room, wrap; a peer that lies is found. Pure
nodes       how two ends find each other in xenstore
bells       how one end wakes the other
channel     Channel: read, write, send, recv, reserve, peek, with deadlines
server      listen: a page for each client
client      connect: wait for a server, map its page
ticket      Ticket: an end on its way to another process
adopting    adopt: go on with it there
"""

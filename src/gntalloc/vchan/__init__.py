"""vchan: a byte channel between two domains, over granted pages. libxenvchan's wire format, byte for byte.

layout      the shared page: where what lies, which sizes go together. Pure
extension   what two ends of this package agree on beside it, in bytes that libxenvchan does not use. Pure
ring        indexes, room, wrap; a peer that lies is found. Pure
role        which bytes of the page are the server's, and which the client's. Pure
nodes       how two ends find each other in xenstore
bells       how one end wakes the other
pages       the pages of one end, and how they are put away
end         End: the page as one end sees it; asking the peer to ring, and telling it
waiting     how a thread waits for what the steps of a call need
ticket      Ticket: an end on its way to another process
core        Core: what a channel can do at once, and the steps of what may have to wait
lending     reserve, commit, peek, release: in place
channel     Channel: the calls, for threads, with deadlines
offers      Offers: a listener's core: a page for each client
server      Listener: clients are waited for, for threads
client      connect: wait for a server, map its page
adopting    adopt: go on in this process with an end that is a ticket
pump        two descriptors and a channel, for `cat`
aio         Channel, Listener, connect for asyncio
"""

"""The process that delivers status callbacks, and the guard on the addresses to which it may connect. It needs no GPU."""

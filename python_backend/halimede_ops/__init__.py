"""The operations of an embedding model: arrays in, arrays out.

The same functions run inside Triton and in the client's own process. They are pure: they do not use
Triton, threads, the environment, the clock, the network or logging. `load` functions read files.
"""

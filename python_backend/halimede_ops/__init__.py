"""The operations of an embedding model: arrays in, arrays out.

The same functions run inside Triton (the folders beside this one) and inside a client's
own process. Nothing here knows Triton, reads the environment, logs, or opens a connection.
"""

"""Other libraries' interfaces to halimede: one module a library, each imported alone.

`sentence_transformers` needs nothing beside halimede. Every other module needs an extra, and names
it if its packages are not installed.
"""

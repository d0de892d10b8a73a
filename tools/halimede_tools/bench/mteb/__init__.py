"""mteb's tasks on a served model, with data that is on this machine.

`handbook` is a retrieval set of our own: 30 sentences, and 22 questions in other words. It proves
the path from mteb to a model and back; its score says little about a model.
"""

"""Applying a trained network to images of any origin: what ``pcenet predict`` and ``model.predict`` do.

`inputs` finds the files, `batches` reads and prepares them, `videos` their frames, `network` computes, `classify` and
`segment` make of its logits what a user wants to know, `windows` does so with large images, `outputs` writes it;
`predict` is the order in which it happens. `predictions` keeps results in memory.
"""

"""Applying a trained network to images of any origin: what ``pcenet predict`` does.

`inputs` finds the files, `batches` reads and prepares them, `classify` labels them, `outputs` writes what comes out;
`predict` is the order in which it happens.
"""

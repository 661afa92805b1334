"""``pcenet explain``: a page on what each expert of a trained network does, and how much it matters."""

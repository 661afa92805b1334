"""``pcenet compare``: several networks, several seeds, one recipe, and what came of it."""

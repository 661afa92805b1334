"""``pcenet app``: a web page on this machine that shows what each expert does.

`session` is the logic, from a network and an image to numbers; `pictures` and `words` show them; `page` lays them out
and says what follows what; `guard` is what a request must pass; `server` puts it on a port. gradio is imported by
`page` and `server` alone.
"""

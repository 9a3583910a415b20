"""`macaron-ops tune`: which tile is the fastest for each product and shape on this GPU, written as a table.

``work`` is what is run and what it must compute, ``candidates`` which tiles are tried, ``search`` how one is chosen,
``journal`` the table that a run writes, ``session`` a run from its shapes to the table.
"""

"""Brute force: what the algorithms say of an architecture, compared with one plain pass per node.

Binding proves locations. The algorithms leave out what a node cannot change, share what nodes have in common,
and remember what was computed before; here each of their numbers is computed anew without any of that.
"""

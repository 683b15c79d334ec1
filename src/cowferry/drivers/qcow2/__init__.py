"""The qcow2 format: copy-on-write images with a backing file.

`header` reads and lays out the header, `changes` makes it say something new, `refcounts` and
`clusters` hold the tables, `image` is the node with its data path and ordered flush, `bitmaps` has
the dirty bitmaps in it, and `check`, `create`, `snapshots` and `compressed` are what their names
say. Source: the qcow2 specification.
"""

from cowferry.drivers.qcow2.image import Qcow2

__all__ = ["Qcow2"]

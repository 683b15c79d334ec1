"""The QED format: copy-on-write images whose metadata is two levels of tables, and nothing else.

There are no refcounts and no free list. Room is taken at the end of the file, so all that a crash
can do is leak it there; `check` finds that and cuts it off. `header` reads and changes the header,
`tables` holds the L1 and L2 tables, `image` is the node with its data path and ordered flush,
`check` and `create` are what their names say.

Source: the QED image file format specification (docs/interop/qed_spec of QEMU).
"""

from cowferry.drivers.qed.image import Qed

__all__ = ["Qed"]

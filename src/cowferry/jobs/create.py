"""blockdev-create as a job: one step, no block-job events, dismissed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cowferry.jobs.job import Job, Progress


class Create(Job):
    """Runs `make` once. Anything that it raises is the job's error."""

    type = "create"
    is_block_job = False

    def __init__(self, make: Callable[[], None], released: Callable[[], None]) -> None:
        super().__init__(length=1, auto_dismiss=False)
        self.make = make
        self.released = released

    def run(self) -> Iterator[Progress]:
        self.make()
        yield Progress(done=1)

    def clean(self) -> None:
        self.released()

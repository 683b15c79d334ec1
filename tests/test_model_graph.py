"""The stateful model of a daemon: two disks, and whatever is done to them, each reads as a flat
bytearray would.

Snapshots, commits of both kinds, mirrors in both modes, streams, groups, changes of images, resizes
and locks, with jobs paused, hurried, switched, completed and called off at any step, over chains
of raw and qcow2 images of all shapes. `Stepped` leads each job by hand, a step at a time, so that
every race is a deterministic test; in `Threaded` jobs run as ever, and guests write meanwhile.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from cowferry.block import moves
from cowferry.block.node import chain
from cowferry.drivers import opening
from cowferry.errors import CowferryError
from cowferry.jobs.backup import Backup
from cowferry.jobs.commit import ActiveCommit
from cowferry.jobs.mirror import Mirror
from cowferry.jobs.states import VERBS, Status
from modelled import Ground, Request, Running, requests, which
from modelling import OVER, PATIENCE, Burst, Layer, clusters, files_of, image_bytes, make_image

LIMIT = 1 << 19
SOAK = os.environ.get("COWFERRY_SOAK") is not None
kinds = st.sampled_from(["raw", "v2", "v3", "v3", "ext"])
number = st.integers(0, 7)
modes = st.sampled_from(["background", "write-blocking"])


class Model(Ground):
    """Everything that may be done to them."""

    # Snapshots ---------------------------------------------------------------------------------

    @rule(
        g=which, cluster=clusters, kind=kinds,
        how=st.sampled_from(["sync", "made", "bare", "both", "abort"]),
    )  # fmt: skip
    def snapshot(self, g: str, cluster: int, kind: str, how: str) -> None:
        if how in ("both", "abort"):
            self.snapshot_of_both(how == "abort")
            return
        guest = self.guests[g]
        old, path = guest.root, self.path(f"{g}.snap")
        may = self.may(g, old, bad=self.odd(g))
        if how == "sync":
            given = {"device": g, "snapshot-file": str(path)}
            done = self.ask("blockdev-snapshot-sync", given, may)
        else:
            kind = "v3" if kind == "raw" else kind
            below = Path(old.filename) if how == "made" else None
            make_image(path, Layer(kind, cluster, guest.disk.size), below, old.driver)
            name = self.add(path, "qcow2", backing=None)
            done = self.ask("blockdev-snapshot", {"node": g, "overlay": name}, may)
        if done:
            assert guest.root.filename == str(path) and guest.root.backing is old
            self.freeze(old)
        self.sweep()

    def snapshot_of_both(self, abort: bool) -> None:
        names = {g: str(self.path(f"{g}.both")) for g in self.guests}
        olds = {g: self.guests[g].root for g in names}
        actions: list[dict[str, Any]] = [
            {"type": "blockdev-snapshot-sync", "data": {"device": g, "snapshot-file": path}}
            for g, path in names.items()
        ]
        each = [self.may(g, olds[g], bad=self.odd(g))[0] for g in names]
        may = False if False in each or abort else None if None in each else True
        if abort:
            actions.append({"type": "abort", "data": {}})
        if self.ask("transaction", {"actions": actions}, (may, False)):
            for g, old in olds.items():
                assert self.guests[g].root.filename == names[g]
                self.freeze(old)

    # Jobs --------------------------------------------------------------------------------------

    @rule(
        g=which,
        upper=number,
        lower=number,
        whole=st.booleans(),
        auto=st.booleans(),
        ops=requests,
        then=number,
    )
    def stream(
        self, g: str, upper: int, lower: int, whole: bool, auto: bool, ops: list[Request], then: int
    ) -> None:
        """Of the disk, or into a layer of it."""
        guest = self.guests[g]
        nodes = list(chain(guest.root))
        k = max(upper - 4, 0) % len(nodes)  # mostly the disk itself
        top, below = nodes[k], nodes[k + 1 :]
        base = None if whole or not below else below[lower % len(below)]
        between = nodes[k : nodes.index(base)] if base is not None else nodes[k:]
        bad = top.driver == "raw" or (k == 0 and top.read_only)
        may = self.may(g, *between, bad=bad)
        given = self.options(g if k == 0 else top.name, auto)
        if base is not None:
            given["base-node"] = base.name

        def done(running: Running) -> None:
            assert top.backing is base
            if base is not None:
                assert base in list(chain(guest.root)) or k > 0

        if self.begin(g, "block-stream", given, may, done):
            self.thaw(top)
            self.follow(self.running[-1], ops, then)

    @rule(g=which, upper=number, lower=number, auto=st.booleans(), ops=requests, then=number)
    def commit(
        self, g: str, upper: int, lower: int, auto: bool, ops: list[Request], then: int
    ) -> None:
        guest = self.guests[g]
        nodes = list(chain(guest.root))
        if len(nodes) == 1:
            return
        i = max(upper - 3, 0) % (len(nodes) - 1)
        j = i + 1 + lower % (len(nodes) - 1 - i)
        top, base = nodes[i], nodes[j]
        held = nodes[max(i - 1, 0) : j + 1]
        size = base.size if i == 0 else min(base.size, nodes[i - 1].size)
        # C1: neither shrunk nor shining through; and no other disk stands on the base.
        elsewhere = sum(os.path.samefile(f, base.filename) for f in files_of(self.daemon)) > 1
        may = self.may(g, *held, bad=size > top.size or elsewhere)
        given = self.options(g, auto, **{"base-node": base.name, "top-node": top.name})

        def done(running: Running) -> None:
            if i == 0:
                assert isinstance(running.job, ActiveCommit)
                if running.job.pivot:
                    assert guest.root is base and not base.read_only
                else:
                    self.compare(base, guest)
            else:
                assert nodes[i - 1].backing is base
                assert moves.half_committed(base.filename) is None

        if self.begin(g, "block-commit", given, may, done):
            self.thaw(base, *nodes[max(i - 1, 0) : i])
            self.follow(self.running[-1], ops, then)

    @rule(
        g=which, how=st.sampled_from(["drive", "existing", "node", "copy"]),
        sync=st.sampled_from(["full", "full", "top", "none"]), kind=kinds, cluster=clusters,
        granularity=st.sampled_from([0, 512, 4096, 64 << 10]), mode=modes, keep=number,
        auto=st.booleans(), ops=requests, then=number,
    )  # fmt: skip
    def mirror(
        self, g: str, how: str, sync: str, kind: str, cluster: int, granularity: int, mode: str,
        keep: int, auto: bool, ops: list[Request], then: int,
    ) -> None:  # fmt: skip
        guest = self.guests[g]
        old, size = guest.root, guest.disk.size
        layer = Layer(kind, cluster, size)
        backing = {"full": None, "top": old.backing, "none": old}[sync]
        given = self.options(g, auto, **{"copy-mode": mode})
        if granularity:
            given["granularity"] = granularity
        held = [old]
        if how == "copy":
            folder = self.path("copy")
            folder.mkdir()
            path = folder / f"{g}{self.number}.img"
            below = list(chain(old))[1:]
            given |= {"target": str(path), "format": layer.format}
            if keep == 1 and below:
                given["shallow"] = True
            elif keep > 1 and below:
                given["keep"] = ["*"] if keep == 2 else [below[keep % len(below)].filename]
                held += below
            overlaid = "shallow" in given or "keep" in given
            command, refused = "x-disk-copy", overlaid and kind == "raw"
        else:
            path = self.path(f"{g}.mirror")
            refused = backing is not None and kind == "raw"
            given |= {"sync": sync, "target": str(path)}
            command = "drive-mirror"
            if how == "drive":
                given["format"] = layer.format
            else:
                again = [p for p, (_, n) in guest.left.items() if n == size]
                if again and sync == "full" and keep > 3:  # back to an image that was left
                    path = Path(again[0])
                    left = guest.left[again[0]][0]
                    layer = layer._replace(kind="v3" if left == "qcow2" else left)
                    given["target"] = str(path)
                elif kind == "raw" or (backing is None and keep):
                    make_image(path, layer)
                elif backing is None:  # a whole copy: what it was made over must not show
                    make_image(path, layer, Path(old.filename), old.driver)
                else:
                    make_image(path, layer, Path(backing.filename), backing.driver)
            if how == "existing":
                given |= {"mode": "existing", "format": layer.format}
            elif how == "node":
                more: dict[str, Any] = {} if layer.kind == "raw" else {"backing": None}
                given["target"] = self.add(path, layer.format, **more)
                command = "blockdev-mirror"
        may = self.may(g, *held, bad=refused)
        failing = self.odd(g) and layer.format != "raw"
        if self.begin(g, command, given, may, self.mirrored, may_fail=failing):
            self.frozen.pop(str(path), None)
            guest.left.pop(str(path), None)
            self.follow(self.running[-1], ops, then)
        self.sweep()

    def mirrored(self, running: Running) -> None:
        """A mirror has completed: by a pivot, or as a copy of this moment (M4)."""
        job, guest, old = running.job, running.guest, running.chain[0]
        assert isinstance(job, Mirror)
        self.compare(job.target, guest)
        if not job.pivot:
            assert guest.root is old
            return
        assert guest.root is job.target and not job.target.read_only
        if guest.burst is None:
            self.compare(old, guest)  # it is left as it was at the pivot
            self.freeze(old)
            if old not in list(chain(guest.root)):
                guest.left[old.filename] = old.driver, old.size

    @rule(
        g=which, how=st.sampled_from(["drive", "drive", "existing", "node"]),
        sync=st.sampled_from(["full", "full", "top"]), kind=kinds, cluster=clusters,
        memory=st.sampled_from([0, 9000, 128 << 20]), auto=st.booleans(), ops=requests, then=number,
    )  # fmt: skip
    def backup(
        self, g: str, how: str, sync: str, kind: str, cluster: int, memory: int, auto: bool,
        ops: list[Request], then: int,
    ) -> None:  # fmt: skip
        """K1: whatever the guest writes meanwhile, the target ends as the disk was at T0."""
        guest = self.guests[g]
        old, path = guest.root, self.path(f"{g}.backup")
        below = old.backing if sync == "top" else None
        layer = Layer(kind, cluster, guest.disk.size)
        given = self.options(g, auto, target=str(path), sync=sync)
        command, refused = "drive-backup", below is not None and kind == "raw"
        if how == "drive":
            given["format"] = layer.format
            refused = refused or (kind != "raw" and self.odd(g))
        else:
            raw = kind == "raw" or (self.odd(g) and below is None)
            layer = layer._replace(kind="raw") if raw else layer
            if below is None or raw:
                make_image(path, layer)
            else:
                make_image(path, layer, Path(below.filename), below.driver)
            refused = below is not None and layer.format == "raw"
            refused = refused or (layer.format != "raw" and self.odd(g))
            if how == "existing":
                given |= {"mode": "existing", "format": layer.format}
            else:
                more: dict[str, Any] = {} if layer.format == "raw" else {"backing": None}
                given["target"] = self.add(path, layer.format, **more)
                command = "blockdev-backup"
        then_bytes = None if guest.burst is not None else bytes(guest.oracle)  # T0

        def done(running: Running) -> None:
            if then_bytes is None:
                return
            with self.daemon.graph.lock:
                for n in self.daemon.graph.every_node():
                    n.flush()
            got = image_bytes(str(path), layer.format)
            assert len(got) == len(then_bytes)
            starts = range(0, len(got), 512)
            wrong = [at for at in starts if got[at : at + 512] != then_bytes[at : at + 512]]
            assert not wrong, f"'{path}' at {wrong[:4]}"

        may = self.may(g, old, bad=refused, sharing=True)
        if self.begin(g, command, given, may, done):
            job = self.running[-1].job
            assert isinstance(job, Backup)
            job.spill.memory = memory
            self.follow(self.running[-1], ops, then)
        self.sweep()

    @rule(
        what=st.sampled_from(["copy", "commit", "stream"]),
        policy=st.sampled_from(["all", "each"]), mode=modes, ops=requests, then=number,
    )  # fmt: skip
    def group(self, what: str, policy: str, mode: str, ops: list[Request], then: int) -> None:
        folder = self.path("group")
        members: list[dict[str, Any]] = [{"device": g} for g in self.guests]
        may: bool | None = None if self.running or self.locked else True
        fails = False
        for member in members:
            g = member["device"]
            nodes = list(chain(self.guests[g].root))
            if what == "copy":
                folder.mkdir(exist_ok=True)
                format = self.rnd.choice(["raw", "qcow2"])
                member |= {"target": str(folder / f"{g}.img"), "format": format}
                fails = fails or (self.odd(g) and format == "qcow2")
            elif what == "commit":
                base, top = nodes[-1], nodes[0]
                shared = sum(os.path.samefile(f, base.filename) for f in files_of(self.daemon)) > 1
                if base is top or base.size > top.size or shared:
                    may = False
            elif nodes[0].driver == "raw" or nodes[0].read_only:
                may = False
            if self.may(g, nodes[0])[0] is False:
                may = False
        if not self.stepped and self.running:
            may = None
        given = {"id": f"{folder.name}", "type": what, "members": members, "policy": policy}
        if what == "copy":
            given["copy-mode"] = mode

        def done(running: Running) -> None:
            if isinstance(running.job, ActiveCommit):
                assert running.job.pivot is (running.guest.root is running.job.target)
            elif isinstance(running.job, Mirror):
                self.mirrored(running)
            else:
                assert running.guest.root.backing is None

        chains = [list(chain(g.root)) for g in self.guests.values()]
        if self.begin("a", "x-group-start", given, (may, False), done, may_fail=fails):
            for nodes in chains:
                self.thaw(nodes[0], nodes[-1])
            self.mix(self.running[-2], ops)
            self.follow(self.running[-1], ops, then)

    # What is done to jobs ----------------------------------------------------------------------

    def chosen(self, n: int) -> Running:
        return self.running[n % len(self.running)]

    def serve(self, running: Running, op: Request) -> None:
        """A request of the guest whose disk a job is on."""
        if self.stepped:
            running.reins.settle()  # another member of its group may have set it going
        if not running.reins.over:  # or what it has brought about could not be looked at any more
            self.request(next(k for k, x in self.guests.items() if x is running.guest), op)

    @rule(n=number, ops=requests)
    def race(self, n: int, ops: list[Request]) -> None:
        """A guest's requests, with a step of a job on its disk after each."""
        if self.running:
            self.mix(self.chosen(n), ops)
        else:
            self.alone(n, ops)

    def alone(self, n: int, ops: list[Request]) -> None:
        """A guest's requests while no job runs.

        That none does is no precondition: jobs have threads, and when one is over must not change
        what Hypothesis draws."""
        for op in ops:
            self.request("ab"[n % 2], op)

    def follow(self, running: Running, ops: list[Request], then: int) -> None:
        """What comes right after the start of a job: it may be all of it."""
        self.mix(running, ops)
        if then < 4:
            self.conclude(running, ops[::-1])

    def mix(self, running: Running, ops: list[Request]) -> None:
        for op in ops:
            self.serve(running, op)
            if self.stepped:
                running.reins.step()

    @rule(n=number, ops=requests)
    def finish(self, n: int, ops: list[Request]) -> None:
        if self.running:
            self.conclude(self.chosen(n), ops)
        else:
            self.alone(n, ops)

    def conclude(self, running: Running, ops: list[Request]) -> None:
        """To the end: ready, completed, finalised, with requests between. A group as a whole."""
        job = running.job
        group, left = job.group, iter(ops)
        ours = [r for r in self.running if r.job is job or (group and r.job.group is group)]

        def all_are(*there: Status) -> None:
            for r in ours:
                self.until(r, lambda r=r: r.job.status in (*there, *OVER))  # type: ignore[misc]
                for op in itertools.islice(left, 2):
                    self.serve(r, op)

        def told(r: Running) -> bool:
            """The group has heard that it is ready, which is a moment later."""
            ready = r.job.status in (Status.READY, Status.STANDBY)
            return not ready or group is None or group.told_ready

        for r in ours:
            if r.job.user_paused:
                self.verb("job-resume", id=r.job.id)
        all_are(Status.READY, Status.STANDBY, Status.WAITING, Status.PENDING)
        for r in ours:
            self.until(r, lambda r=r: told(r))  # type: ignore[misc]
        if group is not None and group.told_ready:
            self.verb("x-group-complete", id=group.id)
        elif group is None:
            self.verb("job-complete", id=job.id)
        all_are(Status.WAITING, Status.PENDING)
        all_are(Status.PENDING)  # a job that is waiting still cannot be finalised
        for r in ours:
            self.verb("job-finalize", id=r.job.id)
        for r in ours:
            self.until(r, lambda r=r: r.reins.over)  # type: ignore[misc]

    def until(self, running: Running, there: Callable[[], bool]) -> None:
        """Go on until it is so."""
        job = running.job
        if self.stepped:
            for _ in range(10_000):
                if there():
                    return
                running.reins.step()
            raise AssertionError(f"{job.id} stays {job.status.value}")
        end = time.monotonic() + PATIENCE
        with job.changed:
            while not there():
                assert time.monotonic() < end, f"{job.id} hangs, {job.status.value}"
                job.changed.wait(0.01)  # a thread's end, or a group, is not told of here

    @rule(
        n=number, auto=st.sampled_from([0, 655_360, 1 << 20]), mode=modes,
        verb=st.sampled_from([
            "job-pause", "job-resume", "job-cancel", "soft", "job-complete", "job-finalize",
            "block-job-set-speed", "block-job-change", "block-job-change", "x-group-cancel",
        ]),
    )  # fmt: skip
    def do(self, n: int, verb: str, auto: int, mode: str) -> None:
        """A verb in whatever state the job is; the table says whether it may be."""
        if not self.running:
            return
        running = self.chosen(n)
        job = running.job
        name = verb.removeprefix("job-").removeprefix("block-job-")
        status = job.status
        if verb == "soft":
            name, verb = "cancel", "block-job-cancel"
            given: dict[str, Any] = {"device": job.id}
        elif verb == "block-job-set-speed":
            given = {"device": job.id, "speed": auto}
        elif verb == "block-job-change":
            given = {"id": job.id, "type": job.type, "copy-mode": mode}
        elif verb == "x-group-cancel":
            if job.group is None:
                return
            name = "cancel"
            given = {"id": job.group.id, "force": auto == 0}
        else:
            given = {"id": job.id}
        accepted = self.verb(verb, **given)
        event(f"{verb} of a {job.type} {status.value}: {'done' if accepted else 'refused'}")
        if self.stepped:
            allowed = status in VERBS[name] and (
                (name == "pause" and not was_paused(running, accepted, True))
                or (name == "resume" and was_paused(running, accepted, False))
                or (name == "change" and isinstance(job, Mirror))
                or (name == "complete" and (job.group is None or job.group.completing))
                or name in ("set-speed", "finalize")
                or (name == "cancel" and (verb != "block-job-cancel" or not job.user_paused))
            )
            assert accepted == allowed, f"{verb} in {status}: {accepted}"
            ours = [r for r in self.running if r.job is job]
            if job.group is not None:
                ours = [r for r in self.running if r.job.group is job.group]
            # First who is called off, or may fail: it calls the others off.
            for r in sorted(ours, key=lambda r: (not r.job.cancelling, r is not running)):
                r.reins.settle()

    def verb(self, verb: str, **given: Any) -> bool:
        try:
            self.daemon.execute(verb, given)
        except CowferryError:
            return False
        return True

    # Other images ------------------------------------------------------------------------------

    def grow(self, g: str, more: int) -> None:
        guest = self.guests[g]
        size = -(-min(guest.disk.size + more * 512, LIMIT) // 512) * 512
        if size < guest.disk.size:
            return
        may = self.may(g, guest.root, bad=guest.disk.read_only)
        if self.ask("block_resize", {"device": g, "size": size}, may):
            guest.oracle.extend(bytes(size - len(guest.oracle)))
            if guest.uri:
                guest.connect(guest.uri)

    @rule(
        g=which, kind=kinds, cluster=clusters, n=number,
        what=st.sampled_from([
            "grow", "grow", "change", "change", "over", "lock", "read-only", "backing", "full",
            "link", "wrong",
        ]),
    )  # fmt: skip
    def alter(self, g: str, what: str, kind: str, cluster: int, n: int) -> None:
        """What is done now and then, and most of it undone soon."""
        if g in self.locked:
            self.lock(g)
        elif self.guests[g].disk.read_only and n < 6:
            self.reopen_read_only(g)
        elif what == "lock":
            self.lock(g)
        elif what == "grow":
            self.grow(g, self.rnd.randrange(200))
        elif what in ("change", "over"):
            self.change(g, kind, cluster, what == "over")
        elif what == "read-only":
            self.reopen_read_only(g)
        elif what == "backing":
            self.replace_backing(g, kind, cluster)
        else:
            self.rename_backing(g, n, what)

    def lock(self, g: str) -> None:
        if g in self.locked:
            self.locked.discard(g)
            self.daemon.execute("x-disk-unlock", {"device": g})
        else:
            given = {"device": g, "reason": "why not"}
            if self.ask("x-disk-lock", given, self.may(g, self.guests[g].root)):
                self.locked.add(g)

    def reopen_read_only(self, g: str) -> None:
        """And back."""
        guest = self.guests[g]
        if guest.burst is not None:
            return
        root = guest.root
        given: dict[str, Any] = {"driver": root.driver, "node-name": root.name}
        if root.backing is not None:
            given["backing"] = root.backing.name
        given["read-only"] = wanted = not root.read_only
        exported = wanted and guest.nbd is not None  # for writing
        self.ask("blockdev-reopen", {"options": [given]}, self.may(g, root, bad=exported))

    def replace_backing(self, g: str, kind: str, cluster: int) -> None:
        """blockdev-reopen with another node below that reads the same, and its name recorded."""
        guest = self.guests[g]
        root, old = guest.root, guest.root.backing
        if old is None or self.working(g) or g in self.locked:
            return
        layer = Layer(kind if old.size % 512 == 0 else "raw", cluster, old.size)
        path = self.path(f"{g}-below").with_suffix(f".{layer.format}")  # a QED root needs to know
        make_image(path, layer)
        node = opening.open_image(str(path), layer.format)
        data = bytearray(old.size)
        old.pread(memoryview(data), 0)
        node.pwrite(memoryview(data), 0)
        opening.close_chain(node)
        name = self.add(path, layer.format, **{"read-only": True})
        given: dict[str, Any] = {
            "driver": root.driver, "node-name": root.name, "backing": name,
            "read-only": root.read_only,
        }  # fmt: skip
        if self.ask("blockdev-reopen", {"options": [given]}, self.may(g, root)):
            given = {"device": g, "image-node-name": root.name, "backing-file": str(path)}
            self.ask("change-backing-file", given, self.may(g, root))
        self.sweep()

    def rename_backing(self, g: str, n: int, how: str) -> None:
        """change-backing-file: the header only, and only if it leads to the same bytes."""
        nodes = list(chain(self.guests[g].root))
        node = nodes[n % len(nodes)]
        if node.backing is None:
            return
        below = Path(node.backing.filename)
        if how == "link":
            link = self.path("link").with_suffix(below.suffix)
            link.symlink_to(below)
            below = link
        elif how == "wrong":
            data = image_bytes(str(below), node.backing.driver)
            for at in range(len(data)):
                data[at] ^= 1
            below = self.path("wrong.raw")
            below.write_bytes(data)
            if node.backing.driver != "raw":
                node_there = Layer("v3", 4096, len(data))
                below = self.path("wrong.qcow2")
                make_image(below, node_there)
                other = opening.open_image(str(below), "qcow2")
                other.pwrite(memoryview(data), 0)
                opening.close_chain(other)
        shows = any(
            e.state.name == "HOLE" for e in node.extents(0, min(node.size, node.backing.size))
        )
        given = {"device": g, "image-node-name": node.name, "backing-file": str(below)}
        if how == "wrong" and not shows:
            return  # nothing of it is to be seen: allowed, and right
        if self.ask("change-backing-file", given, self.may(g, node, bad=how == "wrong")):
            self.thaw(node)

    def change(self, g: str, kind: str, cluster: int, over: bool) -> None:
        """Quietly, to an equal image: a copy of the disk, or an overlay on it."""
        guest = self.guests[g]
        if guest.burst is not None:
            return
        old, size = guest.root, guest.disk.size
        layer = Layer("v3" if over and kind == "raw" else kind, cluster, size)
        path = self.path(f"{g}.change")
        if over:
            make_image(path, layer, Path(old.filename), old.driver)
        else:
            make_image(path, layer)
            if layer.format == "raw" or not self.odd(g):
                node = opening.open_image(str(path), layer.format)
                node.pwrite(memoryview(bytearray(guest.oracle)), 0)
                opening.close_chain(node)
        may = self.may(g, old, bad=layer.format != "raw" and self.odd(g))
        given = {"device": g, "target": str(path), "format": layer.format, "notify": False}
        if self.ask("change", given, may):
            assert guest.root.filename == str(path)
            self.sweep()  # one that was added by itself is still open
            self.freeze(old)
            if not over:
                guest.left[old.filename] = old.driver, old.size


def was_paused(running: Running, accepted: bool, now: bool) -> bool:
    """Whether the job was paused before a verb that, accepted, made it `now`."""
    return running.job.user_paused if not accepted else not now


class Stepped(Model):
    """Every job is led by hand: nothing moves but what a rule moves."""


class Threaded(Model):
    """Jobs run in their threads, and guests write meanwhile."""

    stepped = False

    @rule(g=which, at=st.floats(0, 1), length=st.integers(1, 200_000), writes=st.integers(1, 150))
    def burst(self, g: str, at: float, length: int, writes: int) -> None:
        """A guest goes on writing, to a range that is its own, while the next rules run."""
        guest = self.guests[g]
        if guest.burst is not None or guest.disk.read_only:
            return
        span = guest.range(at, length)
        guest.burst = Burst(guest, span, self.rnd.randrange(1 << 30), writes)
        guest.burst.start()

    @rule(g=which)
    def end_burst(self, g: str) -> None:
        burst = self.guests[g].burst
        if burst is not None:
            burst.end()


for machine in (Stepped, Threaded):
    machine.TestCase.settings = settings(
        max_examples=1500 if SOAK else 100,
        stateful_step_count=60 if SOAK else 30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
TestStepped = Stepped.TestCase
TestThreaded = Threaded.TestCase

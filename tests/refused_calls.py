"""Arguments of QMP commands that have to be refused, by command.

In strings {f} is the folder of images of a `House`, {run} the folder of its sockets, {device} a
device and {tiny} one that is too small.
"""

from __future__ import annotations

from typing import Any

from houses import SIZE

Arguments = dict[str, Any]

FILE = {"driver": "file", "filename": "{f}/alone.qcow2"}
NOSUCH = {"device": "nosuch"}
NODE = {"node": "nosuch", "name": "b0"}
TO_USER = {"device": "vm", "job-id": "x", "target": "{f}/user.txt", "sync": "full"}


def drive(**more: Any) -> Arguments:
    """Arguments of drive-mirror and drive-backup, with `_` for `-`."""
    plain = {key.replace("_", "-"): value for key, value in more.items()}
    given = {"device": "vm", "job-id": "x", "target": "{f}/new.raw", "sync": "full"}
    return {**given, "auto-dismiss": False, **plain}


DRIVES = [
    drive(device="nosuch"),
    drive(target="{f}/user.txt"),
    drive(target="{f}/vm.qcow2"),
    drive(target="{f}/base.raw", mode="existing", format="raw"),
    drive(target="{f}/two.raw", mode="existing", format="raw"),
    drive(target="{f}/locked.raw", mode="existing", format="raw"),
    drive(target="{f}/locked.qcow2", format="qcow2"),
    drive(target="{f}/smaller.raw", mode="existing", format="raw"),
    drive(target="{f}/nowhere.raw", mode="existing", format="raw"),
    drive(target="{f}/nowhere/new.raw"),
    drive(target="{f}/folder"),
    drive(target="{f}/over.qcow2", mode="existing", format="raw", sync="some"),
    drive(target="{tiny}", format="raw"),
    drive(target="{tiny}", format="raw", mode="existing"),
    drive(target="{device}", format="qed"),
    drive(format="bogus"),
    drive(format="raw", sync="top"),
    drive(speed=-1),
    drive(job_id="9"),
    drive(job_id="j"),
    drive(node_name="vm"),
    drive(on_target_error="some"),
    drive(device="kept"),
    drive(device="busy"),
    drive(target="nbd+unix:///a?socket={run}/nowhere.sock", format="raw", mode="existing"),
]


def create(job: str = "x", **options: Any) -> Arguments:
    """Arguments of blockdev-create, which fails as a job: see `made_to_fail`."""
    return {"job-id": job, "options": {key.replace("_", "-"): v for key, v in options.items()}}


def action(kind: str, **data: Any) -> Arguments:
    """One action of a transaction."""
    return {"type": kind, "data": {key.replace("_", "-"): value for key, value in data.items()}}


SNAP = action("blockdev-snapshot-sync", node_name="vm", snapshot_file="{f}/new.qcow2",
              snapshot_node_name="x")  # fmt: skip

#: Arguments that have to be refused, by command. A list may be empty: such a command needs no
#: arguments and cannot fail, but for arguments that it does not know.
CALLS: dict[str, list[Arguments]] = {
    "qmp_capabilities": [{"enable": ["bogus"]}],
    "query-version": [],
    "query-commands": [],
    "query-qmp-schema": [],
    "query-status": [],
    "human-monitor-command": [{"command-line": "info block", "cpu-index": "x"}],
    "quit": [],
    "x-stop": [{"drain": -1}],
    "block_set_io_throttle": [
        {
            "device": "nosuch",
            **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0),
        },
        {
            "device": "vm",
            **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 5),
        },
    ],
    "x-disk-limit": [NOSUCH, {"device": "vm", "bps": -1}, {"device": "ro", "bps_wr": 1 << 20}],
    "x-query-limits": [NOSUCH],
    "blockdev-add": [
        {"driver": "bogus", "node-name": "x"},
        {"driver": "qcow2", "node-name": "x", "file": "nosuch"},
        {"driver": "qcow2", "node-name": "vm", "file": FILE},
        {"driver": "qcow2", "node-name": "9x", "file": FILE},
        {"driver": "qed", "node-name": "x", "file": FILE},
        {"driver": "qcow2", "node-name": "x", "file": FILE, "bogus": 1},
        {"driver": "qcow2", "node-name": "x", "file": FILE, "backing": "nosuch"},
        {"driver": "raw", "node-name": "x", "file": {**FILE, "filename": "{f}/locked.raw"}},
        {"driver": "raw", "node-name": "x", "file": {**FILE, "filename": "{f}/nowhere"}},
        {"driver": "raw", "node-name": "x", "size": 1 << 30, "file": FILE},
        {
            "driver": "nbd",
            "node-name": "x",
            "export": "a",
            "server": {"type": "unix", "path": "{run}/nowhere.sock"},
        },
        {"driver": "throttle", "node-name": "x", "throttle-group": "nosuch", "file": "two"},
    ],
    "blockdev-del": [{"node-name": "nosuch"}, {"node-name": "vm"}],
    "blockdev-create": [
        create(),
        create(driver="bogus", filename="{f}/new.raw", size=1 << 20),
        create(driver="file", filename="{f}/nowhere/new.raw", size=1 << 20),
        create(driver="file", filename="{f}/locked.raw", size=1 << 20),
        create(driver="file", filename="{f}/two.raw", size=1 << 20),
        create(driver="file", filename="{f}/vm.qcow2", size=1 << 20),
        create(driver="file", filename="{f}/other.raw", size=-1),
        create(driver="file", filename="{f}/plain.raw", size=1 << 62),
        create(driver="file", filename="{f}/plain.raw", size=1 << 20, preallocation="some"),
        create(driver="qcow2", file="nosuch", size=1 << 20),
        create(driver="qcow2", file="vm", size=1 << 20),
        create(driver="qcow2", file="two", size=1 << 20, cluster_size=1000),
        create(
            driver="qcow2", file={"driver": "file", "filename": "{f}/locked.qcow2"}, size=1 << 20
        ),
        create("9", driver="file", filename="{f}/new.raw", size=1 << 20),
        create("j", driver="file", filename="{f}/new.raw", size=1 << 20),
    ],
    "block_resize": [
        {"device": "nosuch", "size": SIZE},
        {"device": "vm", "size": -1},
        {"device": "vm", "size": 1 << 63},
        {"device": "vm", "size": SIZE * 2 + 1},
        {"device": "ro", "size": 2 * SIZE},
        {"device": "kept", "size": 2 * SIZE},
        {"device": "busy", "size": 2 * SIZE},
        {"size": SIZE},
    ],
    "query-named-block-nodes": [{"flat": "x"}],
    "query-block": [],
    "x-query-tree": [NOSUCH],
    "x-disk-add": [
        {"device": "x", "filename": "{f}/nowhere.raw"},
        {"device": "vm", "filename": "{f}/alone.qcow2"},
        {"device": "x", "filename": "{f}/vm.qcow2"},
        {"device": "x", "filename": "{f}/locked.raw"},
        {"device": "x", "filename": "{f}/half.qcow2"},
        {"device": "x", "filename": "{f}/user.txt", "format": "qcow2"},
    ],
    "x-disk-remove": [
        NOSUCH,
        {"device": "kept"},
        {"device": "busy"},
        {"device": "kept", "force": True},
    ],
    "x-disk-lock": [{**NOSUCH, "reason": "x"}, {"device": "kept", "reason": "x"}],
    "x-disk-unlock": [NOSUCH, {"device": "vm"}],
    "x-query-locks": [],
    "query-jobs": [],
    "query-block-jobs": [],
    "job-pause": [{"id": "nosuch"}],
    "job-resume": [{"id": "nosuch"}, {"id": "j"}],
    "job-cancel": [{"id": "nosuch"}],
    "job-complete": [{"id": "nosuch"}],
    "job-finalize": [{"id": "nosuch"}, {"id": "j"}],
    "job-dismiss": [{"id": "nosuch"}, {"id": "j"}],
    "block-job-pause": [NOSUCH],
    "block-job-resume": [NOSUCH],
    "block-job-complete": [NOSUCH],
    "block-job-finalize": [{"id": "nosuch"}],
    "block-job-dismiss": [{"id": "nosuch"}],
    "block-job-cancel": [NOSUCH],
    "block-job-set-speed": [{**NOSUCH, "speed": 1}, {"device": "j", "speed": -1}],
    "block-job-change": [
        {"id": "nosuch", "type": "mirror", "copy-mode": "background"},
        {"id": "j", "type": "stream"},
    ],
    "block-stream": [
        {**NOSUCH, "job-id": "x"},
        {"device": "two", "job-id": "x"},
        {"device": "vm", "job-id": "j"},
        {"device": "vm", "job-id": "9"},
        {"device": "vm", "job-id": "x", "base": "nosuch"},
        {"device": "vm", "job-id": "x", "backing-file": "x"},
        {"device": "vm", "job-id": "x", "speed": -1},
        {"device": "kept", "job-id": "x"},
    ],
    "block-commit": [
        {**NOSUCH, "job-id": "x"},
        {"device": "two", "job-id": "x"},
        {"device": "vm", "job-id": "x", "top": "nosuch"},
        {"device": "vm", "job-id": "x", "base": "{f}/vm.qcow2"},
        {"device": "vm", "job-id": "x", "backing-file": "x"},
        {"device": "vm", "job-id": "j"},
        {"device": "kept", "job-id": "x"},
    ],
    "blockdev-mirror": [
        {**NOSUCH, "job-id": "x", "target": "two", "sync": "full"},
        {"device": "vm", "job-id": "x", "target": "nosuch", "sync": "full"},
        {"device": "vm", "job-id": "x", "target": "vm", "sync": "full"},
        {"device": "vm", "job-id": "x", "target": "two", "sync": "full"},
        {"device": "vm", "job-id": "x", "target": "ro", "sync": "full"},
    ],
    "drive-mirror": [*DRIVES, drive(granularity=1000), drive(copy_mode="some")],
    "x-disk-copy": [
        {**NOSUCH, "job-id": "x", "target": "{f}/new.raw"},
        {"device": "vm", "job-id": "x", "target": "{f}/user.txt"},
        {"device": "vm", "job-id": "x", "target": "{f}/new.raw", "keep": ["nosuch"]},
        {"device": "vm", "job-id": "x", "target": "{f}/new.raw", "shallow": True},
        {"device": "vm", "job-id": "j", "target": "{f}/new.raw"},
        {"device": "vm", "job-id": "x", "target": "{f}/new.raw", "granularity": 1000},
        {"device": "vm", "job-id": "x", "target": "{tiny}", "format": "raw"},
    ],
    "transaction": [
        {"actions": [action("bogus")]},
        {
            "actions": [
                SNAP,
                action(
                    "blockdev-snapshot-sync",
                    node_name="nosuch",
                    snapshot_file="{f}/new2.qcow2",
                    snapshot_node_name="y",
                ),
            ]
        },
        {
            "actions": [
                SNAP,
                action(
                    "blockdev-snapshot-sync",
                    node_name="two",
                    snapshot_file="{f}/user.txt",
                    snapshot_node_name="y",
                ),
            ]
        },
        {
            "actions": [
                SNAP,
                action(
                    "blockdev-snapshot-sync",
                    node_name="two",
                    snapshot_file="{f}/nowhere/x.qcow2",
                    snapshot_node_name="y",
                ),
            ]
        },
        {
            "actions": [
                action("block-dirty-bitmap-add", node="two", name="b1"),
                action("block-dirty-bitmap-add", node="two", name="b1"),
            ]
        },
        {
            "actions": [
                action("block-dirty-bitmap-add", node="two", name="b1", persistent=True),
                action("block-dirty-bitmap-remove", node="two", name="nosuch"),
            ]
        },
        {
            "actions": [
                action(
                    "drive-backup",
                    **{
                        "device": "two",
                        "job-id": "x",
                        "sync": "full",
                        "target": "{f}/new.raw",
                        "format": "raw",
                    },
                ),
                action(
                    "drive-backup",
                    **{"device": "two", "job-id": "y", "sync": "full", "target": "{f}/user.txt"},
                ),
            ]
        },
        {"actions": [SNAP], "properties": {"completion-mode": "some"}},
        {"actions": [action("abort"), SNAP]},
        {"actions": [SNAP, action("abort")]},
    ],
    "blockdev-snapshot": [
        {"node": "nosuch", "overlay": "two"},
        {"node": "vm", "overlay": "nosuch"},
        {"node": "vm", "overlay": "two"},
        {"node": "vm", "overlay": "vm"},
    ],
    "blockdev-snapshot-sync": [
        {**NOSUCH, "snapshot-file": "{f}/new.qcow2"},
        {"device": "vm", "snapshot-file": "{f}/user.txt"},
        {"device": "vm", "snapshot-file": "{f}/nowhere/new.qcow2"},
        {"device": "vm", "snapshot-file": "{f}/new.raw", "format": "raw"},
        {"device": "vm", "snapshot-file": "{f}/base.raw", "mode": "existing"},
        {"device": "vm", "snapshot-file": "{f}/small.qcow2", "mode": "existing"},
        {"device": "vm", "snapshot-file": "{f}/locked.qcow2", "mode": "existing"},
        {"device": "vm", "snapshot-file": "{f}/new.qcow2", "snapshot-node-name": "9x"},
        {"device": "vm", "snapshot-file": "{f}/new.qcow2", "snapshot-node-name": "two"},
        {"device": "kept", "snapshot-file": "{f}/new.qcow2"},
        {"device": "vm", "snapshot-file": "{tiny}"},
    ],
    "snapshot_blkdev": [
        {**NOSUCH, "snapshot_file": "{f}/new.qcow2"},
        {"device": "vm", "snapshot_file": "{f}/user.txt"},
    ],
    "x-disk-snapshot": [
        {"disks": []},
        {"disks": [NOSUCH]},
        {"disks": [{"device": "vm", "snapshot-file": "{f}/new.qcow2"}, NOSUCH]},
        {
            "disks": [
                {"device": "vm", "snapshot-file": "{f}/new.qcow2"},
                {"device": "two", "snapshot-file": "{f}/new.qcow2"},
            ]
        },
        {"disks": [{"device": "vm"}, {"device": "vm"}]},
        {"disks": [{"device": "vm"}], "quiesce": ["{run}/nowhere.sock"]},
    ],
    "block-dirty-bitmap-add": [
        NODE,
        {"node": "vm", "name": "b0"},
        {"node": "vm", "name": ""},
        {"node": "vm", "name": "b1", "granularity": 1000},
        {"node": "ro", "name": "b1", "persistent": True},
        {"node": "two", "name": "b" * 2000, "persistent": True},
    ],
    "block-dirty-bitmap-remove": [NODE, {"node": "vm", "name": "nosuch"}],
    "block-dirty-bitmap-clear": [NODE, {"node": "vm", "name": "nosuch"}],
    "block-dirty-bitmap-enable": [NODE, {"node": "vm", "name": "nosuch"}],
    "block-dirty-bitmap-disable": [NODE, {"node": "vm", "name": "nosuch"}],
    "block-dirty-bitmap-merge": [
        {"node": "nosuch", "target": "b0", "bitmaps": []},
        {"node": "vm", "target": "b0", "bitmaps": ["nosuch"]},
        {"node": "vm", "target": "nosuch", "bitmaps": ["b0"]},
    ],
    "x-debug-block-dirty-bitmap-sha256": [NODE, {"node": "vm", "name": "nosuch"}],
    "x-query-bitmaps": [NOSUCH],
    "x-query-bitmap-extents": [
        NODE,
        {"node": "vm", "name": "nosuch"},
        {"node": "vm", "name": "b0", "offset": -1},
    ],
    "blockdev-backup": [
        {**NOSUCH, "job-id": "x", "target": "two", "sync": "full"},
        {"device": "vm", "job-id": "x", "target": "nosuch", "sync": "full"},
        {"device": "vm", "job-id": "x", "target": "vm", "sync": "full"},
        {"device": "vm", "job-id": "x", "target": "two", "sync": "full"},
        {"device": "vm", "job-id": "x", "target": "ro", "sync": "full"},
    ],
    "drive-backup": [
        *DRIVES,
        drive(sync="incremental", bitmap="nosuch"),
        drive(format="raw", compress=True),
    ],
    "x-disk-backup": [
        {"id": "x", "disks": []},
        {"id": "x", "disks": [{**NOSUCH, "target": "{f}/new.raw"}]},
        {"id": "x", "disks": [{"device": "vm", "target": "{f}/user.txt"}]},
        {
            "id": "x",
            "disks": [
                {"device": "vm", "target": "{f}/new.raw"},
                {"device": "two", "target": "{f}/user.txt"},
            ],
        },
        {
            "id": "x",
            "disks": [{"device": "vm", "target": "{f}/new.qcow2"}],
            "bitmap": "nosuch",
            "mode": "incremental",
        },
        {"id": "j", "disks": [{"device": "vm", "target": "{f}/new.raw"}]},
        {"id": "x", "disks": [{"device": "vm", "target": "{f}/new.raw"}], "speed": -1},
        {"id": "x", "disks": [{"device": "vm", "target": "{f}/new.raw"}], "scratch": "{f}/nowhere"},
    ],
    "x-backup-export": [
        {"disks": []},
        {"disks": [NOSUCH]},
        {"disks": [{"device": "vm"}, NOSUCH]},
        {"disks": [{"device": "vm", "name": "two"}]},
        {"disks": [{"device": "vm"}], "scratch": "{f}/nowhere"},
        {"disks": [{"device": "vm"}], "scratch": "{f}/user.txt"},
    ],
    "x-backup-export-end": [{"id": "nosuch"}],
    "x-query-backup-exports": [],
    "change": [
        {**NOSUCH, "target": "{f}/alone.qcow2"},
        {"device": "vm", "target": "{f}/nowhere.qcow2"},
        {"device": "vm", "target": "{f}/locked.qcow2"},
        {"device": "vm", "target": "{f}/user.txt", "format": "qcow2"},
        {"device": "busy", "target": "{f}/alone.qcow2"},
        {"device": "two", "target": "{f}/smaller.raw", "notify": False},
    ],
    "change-backing-file": [
        {**NOSUCH, "image-node-name": "vm", "backing-file": "base.raw"},
        {"device": "vm", "image-node-name": "nosuch", "backing-file": "base.raw"},
        {"device": "vm", "image-node-name": "vm", "backing-file": "nowhere.raw"},
        {"device": "vm", "image-node-name": "vm", "backing-file": "other.raw"},
        {"device": "two", "image-node-name": "two", "backing-file": "base.raw"},
    ],
    "blockdev-reopen": [
        {"options": [{"driver": "raw", "node-name": "nosuch", "file": FILE}]},
        {"options": [{"driver": "qcow2", "node-name": "vm", "file": FILE}]},
        {"options": [{"driver": "raw", "node-name": "two", "bogus": 1}]},
    ],
    "x-group-start": [
        {"id": "x", "type": "copy", "members": []},
        {"id": "x", "type": "copy", "members": [{**NOSUCH, "target": "{f}/new.raw"}]},
        {"id": "x", "type": "copy", "members": [{"device": "two", "target": "{f}/user.txt"}]},
        {"id": "9", "type": "copy", "members": [{"device": "two", "target": "{f}/new.raw"}]},
        {"id": "x", "type": "stream", "members": [{"device": "two"}]},
        {"id": "x", "type": "commit", "members": [{"device": "two"}]},
    ],
    "x-group-complete": [{"id": "nosuch"}],
    "x-group-cancel": [{"id": "nosuch"}],
    "x-query-groups": [],
    "x-query-failed-jobs": [],
    "add-fd": [{}, {"fdset-id": -1}],
    "remove-fd": [{"fdset-id": 77}],
    "query-fdsets": [],
    "getfd": [{"fdname": "x"}],
    "closefd": [{"fdname": "nosuch"}],
    "nbd-server-start": [
        {"addr": {"type": "unix", "data": {"path": "{f}/user.txt"}}},
        {"addr": {"type": "unix", "data": {"path": "{run}/second.sock"}}},
        {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "70000"}}},
        {"addr": {"type": "bogus"}},
    ],
    "nbd-server-stop": [],
    "block-export-add": [
        {"type": "nbd", "id": "x", "node-name": "nosuch"},
        {"type": "nbd", "id": "vm", "node-name": "vm"},
        {"type": "nbd", "id": "x", "node-name": "vm", "name": "two"},
        {"type": "nbd", "id": "x", "node-name": "ro", "writable": True},
        {"type": "nbd", "id": "x", "node-name": "vm", "bitmaps": ["nosuch"]},
        {"type": "fuse", "id": "x", "node-name": "vm"},
    ],
    "block-export-del": [{"id": "nosuch"}],
    "query-block-exports": [],
    "block_stream": [NOSUCH, {"device": "two"}],
    "block_stream_cancel": [NOSUCH, {"device": "two"}],
    "query-block-stream": [],
    "object-add": [
        {"qom-type": "bogus", "id": "x"},
        {"qom-type": "throttle-group", "id": "9"},
        {"qom-type": "throttle-group", "id": "x", "limits": {"bps-total": -1}},
    ],
    "object-del": [{"id": "nosuch"}],
    "qom-list": [{"path": "/nosuch"}],
    "qom-get": [{"path": "/nosuch", "property": "x"}],
    "qom-set": [{"path": "/nosuch", "property": "x", "value": 1}],
}

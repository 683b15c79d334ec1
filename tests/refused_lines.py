"""Lines of the command line that have to be refused, by verb.

{f} is the folder of images of a `House`, {run} the folder of its sockets, {device} a device and
{tiny} one that is too small.
"""

from __future__ import annotations

LINES: dict[str, str] = {
    "create": """
        {f}/new.qcow2
        {f}/new.qcow2 -5
        {f}/new.qcow2 1x
        {f}/new.qcow2 9E
        {f}/new.qcow2 1M -o nosuch=1
        {f}/new.qcow2 1M -o cluster_size=1000
        {f}/new.qcow2 1M -o preallocation=some
        {f}/new.qcow2 1M -o compat=9
        {f}/new.qcow2 1M -o encryption=on
        {f}/new.qcow2 1M -o data_file={f}/new.data,nosuch=1
        {f}/new.qcow2 1M -o data_file={f}/locked.raw
        {f}/new.qcow2 1M -o data_file={f}/nowhere/new.data
        {f}/new.qcow2 1M -o data_file={f}/vm.qcow2
        {f}/new.qcow2 -b {f}/base.raw
        {f}/new.qcow2 -b {f}/nowhere.raw -F raw
        {f}/new.qcow2 -b {f}/alone.qcow2 -F bogus
        {f}/new.qcow2 -b {f}/user.txt -F qcow2
        {f}/new.raw 1M -f bogus
        {f}/new.raw 7E
        {f}/new.raw 1M -f raw -o preallocation=some
        {f}/new.raw 1M -f raw -o nosuch=1
        {f}/new.qed 1M -f qed -o table_size=3
        {f}/new.qed 1P -f qed
        {f}/nowhere/new.qcow2 1M
        {f}/folder 1M
        {f}/fifo.raw 1M
        {f}/user.txt/new.qcow2 1M
        {f}/other.raw 7E
        {f}/other.raw 1M -o nosuch=1
        {f}/plain.raw 1M -f raw -o preallocation=some
        {f}/plain.raw 7E
        {f}/moved.qcow2 1M -o nosuch=1
        {f}/moved.qcow2 9E
        {f}/half.qcow2 1M -o nosuch=1
        {f}/copied.qcow2 1M -o cluster_size=1000
        {f}/part.raw 1M -o nosuch=1
        {f}/part.raw 1M -f raw -b {f}/nowhere.raw -F raw
        {f}/alone.qcow2 1M -o nosuch=1
        {f}/alone.qcow2 1M -b {f}/alone.qcow2 -F qcow2
        {f}/ext.qcow2 1M -f qcow2 -o data_file={f}/ext.data,nosuch=1
        {f}/ext.qcow2 1M -f qcow2 -o data_file={f}/ext.data,cluster_size=1000
        {f}/vm.qcow2 1M
        {f}/alias.qcow2 1M
        {f}/vm.qcow2 1M -o preallocation=full
        {f}/base.raw 1M
        {f}/base.raw 1M -f qcow2
        {f}/locked.qcow2 1M
        {f}/locked.raw 1M
        {f}/locked.raw 1M -f qcow2
        {f}/locked.raw 1M -f raw -o preallocation=full
        {f}/busy.copy.raw 1M
        {device} 1M -f qed
        {device} 1M -f raw
        {device} 1M -f qcow2 -o preallocation=full
        {device} 1M -f qcow2 -o preallocation=falloc
        {device} 1M -f qcow2 -o nosuch=1
        {device} 1G -f raw -o preallocation=full
        {tiny} 1M -f raw
        {tiny} 1M -f qcow2
        {tiny} 1M -f qcow2 -o preallocation=metadata
        nbd://127.0.0.1:1/x 1M
    """,
    "info": """
        {f}/nowhere.qcow2
        {f}/user.txt -f qcow2
        {f}/locked.qcow2
        {f}/alone.qcow2 -f qed
        {f}/alone.qcow2 --output xml
        {f}/folder
        driver=qcow2,file.filename={f}/nowhere --image-opts
        nbd://127.0.0.1:1/x
    """,
    "map": """
        {f}/nowhere.qcow2
        {f}/user.txt -f qcow2
        {f}/locked.qcow2
        {f}/alone.qcow2 -s -5
        {f}/part.raw -f qcow2
    """,
    "check": """
        {f}/nowhere.qcow2
        {f}/locked.qcow2 -r all
        {f}/vm.qcow2 -r all
        {f}/vm.qcow2 -r leaks
        {f}/base.raw -r all
        {f}/user.txt -f qcow2 -r all
        {f}/alone.qcow2 -f qed -r all
        {f}/alone.qcow2 -r some
        {f}/alone.qed -f qcow2 -r all
        {f}/folder -r all
    """,
    "convert": """
        {f}/alone.qcow2
        {f}/nowhere.qcow2 {f}/new.raw
        {f}/user.txt {f}/new.raw -f qcow2
        {f}/locked.qcow2 {f}/new.raw
        {f}/alone.qcow2 {f}/alone.qcow2 -O qcow2
        {f}/alone.qcow2 {f}/new.raw -O bogus
        {f}/alone.qcow2 {f}/new.qcow2 -O qcow2 -o nosuch=1
        {f}/alone.qcow2 {f}/new.qcow2 -O qcow2 -o cluster_size=1000
        {f}/alone.qcow2 {f}/new.qcow2 -O qcow2 -B {f}/base.raw
        {f}/alone.qcow2 {f}/new.qcow2 -O qcow2 -B {f}/nowhere.raw -F raw
        {f}/alone.qcow2 {f}/new.qcow2 -O qcow2 -B {f}/user.txt -F qcow2
        {f}/alone.qcow2 {f}/new.raw -O raw -c
        {f}/alone.qcow2 {f}/nowhere/new.raw
        {f}/alone.qcow2 {f}/folder
        {f}/alone.qcow2 {f}/fifo.raw
        {f}/alone.qcow2 {f}/nowhere.qcow2 -n -O qcow2
        {f}/alone.qcow2 {f}/smaller.raw -n
        {f}/alone.qcow2 {f}/user.txt -n
        {f}/alone.qcow2 {f}/user.txt -n -O qcow2
        {f}/alone.qcow2 {f}/locked.raw
        {f}/alone.qcow2 {f}/locked.raw -n
        {f}/alone.qcow2 {f}/locked.qcow2 -O qcow2
        {f}/alone.qcow2 {f}/locked.qcow2 -O qcow2 -n
        {f}/alone.qcow2 {f}/vm.qcow2 -O qcow2
        {f}/alone.qcow2 {f}/alias.qcow2 -O qcow2
        {f}/alone.qcow2 {f}/base.raw
        {f}/alone.qcow2 {f}/plain.raw -o nosuch=1
        {f}/alone.qcow2 {f}/moved.qcow2 -O qcow2 -o nosuch=1
        {f}/over.qcow2 {f}/base.raw -U -O raw
        {f}/moved.snap1.qcow2 {f}/moved.qcow2 -O qcow2
        {f}/moved.snap1.qcow2 {f}/moved.qcow2 -O qcow2 -n
        {f}/ext.qcow2 {f}/ext.data -O raw
        {f}/alone.qcow2 {f}/alone.qed -O qed -o table_size=3
        {f}/alone.qcow2 {f}/alone.qed -n -O qcow2
        {f}/alone.qcow2 {tiny}
        {f}/alone.qcow2 {tiny} -n
        {f}/alone.qcow2 {tiny} -O qcow2
        {f}/alone.qcow2 {device} -O qed
        {f}/alone.qcow2 {f}/new.qcow2 -O qcow2 --skip-broken-bitmaps
        {f}/alone.qcow2 {f}/new.qed -O qed --bitmaps -o nosuch=1
        {f}/alone.qcow2 nbd+unix:///a?socket={run}/nowhere.sock -n
        {f}/alone.qcow2 nbd+unix:///nosuch?socket={run}/qsd.sock -n
        nbd+unix:///a?socket={run}/nowhere.sock {f}/new.raw
        nbd://127.0.0.1:1/x {f}/new.qcow2 -O qcow2
    """,
    "compare": """
        {f}/nowhere.qcow2 {f}/base.raw
        {f}/alone.qcow2 {f}/nowhere.raw
        {f}/alone.qcow2 {f}/other.raw
        {f}/alone.qcow2 {f}/locked.qcow2
        {f}/alone.qcow2 {f}/user.txt -F qcow2
    """,
    "resize": """
        {f}/nowhere.qcow2 1M
        {f}/alone.qcow2 -1M
        {f}/alone.qcow2 128k
        {f}/alone.qcow2 some
        {f}/alone.qcow2 9E
        {f}/alone.qcow2 +7E
        {f}/alone.qcow2 1M --preallocation full
        {f}/alone.qed 128k --shrink
        {f}/other.raw 7E
        {f}/plain.raw 128k
        {f}/user.txt 1M -f qcow2
        {f}/locked.qcow2 1M
        {f}/locked.raw 1M
        {f}/vm.qcow2 1M
        {f}/base.raw 1M
        {f}/folder 1M
        {device} 64M -f raw
        vm 128k --live
        vm 9E --live
        ro 1M --live
        kept 1M --live
        busy 1M --live
        nosuch 1M --live
    """,
    "rebase": """
        {f}/over.qcow2
        {f}/over.qcow2 -b {f}/nowhere.raw -F raw
        {f}/over.qcow2 -b {f}/other.raw
        {f}/over.qcow2 -b {f}/other.raw -F bogus
        {f}/over.qcow2 -b {f}/other.raw -F qcow2
        {f}/over.qcow2 -b {f}/over.qcow2 -F qcow2
        {f}/over.qcow2 -u -b {f}/over.qcow2 -F qcow2
        {f}/over.qcow2 -u -b json:{{}} -F raw
        {f}/over.qcow2 -b {f}/locked.raw -F raw
        {f}/moved.qcow2 -b {f}/moved.snap1.qcow2 -F qcow2
        {f}/moved.qcow2 -u -b {f}/moved.snap1.qcow2 -F qcow2
        {f}/other.raw -b {f}/base.raw -F raw
        {f}/alone.qcow2 --complete
        {f}/locked.raw --complete
        {f}/locked.qcow2 -b {f}/base.raw -F raw
        {f}/locked.qcow2 -u -b {f}/base.raw -F raw
        {f}/vm.qcow2 -b ""
        {f}/nowhere.qcow2 -b ""
        {f}/alone.qed -f qcow2 -b ""
        {f}/part.raw -b {f}/nowhere.raw -F raw
    """,
    "bitmap": """
        {f}/nowhere.raw --add b1
        {f}/plain.raw --add b0
        {f}/plain.raw --remove nosuch
        {f}/plain.raw --clear nosuch
        {f}/plain.raw --merge nosuch b0
        {f}/plain.raw --add
        {f}/plain.raw --add b1 -g 1000
        {f}/plain.raw --add b1 --merge nosuch
        {f}/plain.raw --add b1 --transient
        {f}/plain.raw --map nosuch
        {f}/plain.raw --merge b0 -b {f}/nowhere.raw b0
        {f}/plain.raw --merge b0 -b {f}/smaller.raw b0
        {f}/alone.qcow2 --add b0
        {f}/alone.qcow2 --remove nosuch
        {f}/alone.qcow2 --add b1 -f qed
        {f}/locked.raw --add b1
        {f}/locked.raw --remove b0
        {f}/locked.qcow2 --add b1
        {f}/user.txt --add b1 -f qcow2
        {f}/folder --add b1
        vm --live --add b0
        vm --live --remove nosuch
        ro --live --add b1
        nosuch --live --add b1
    """,
    "current": """
        {f}/moved.qcow2 {f}/half.qcow2
        {f}/moved.qcow2 --output xml
    """,
    "serve": """
        {f}/nowhere.qcow2
        a={f}/alone.qcow2 b={f}/nowhere.qcow2
        a={f}/alone.qcow2 a={f}/other.raw
        {f}/user.txt -f qcow2
        {f}/locked.qcow2
        {f}/half.qcow2
        {f}/copied.qcow2
        {f}/alone.qcow2 --tcp nonsense
        {f}/alone.qcow2 --tcp 127.0.0.1:70000
        {f}/alone.qcow2 --socket {f}/user.txt
        {f}/alone.qcow2 --socket {f}/nowhere/nbd.sock
        {f}/alone.qcow2 --limit nosuch,bps-total=1M
        {f}/alone.qcow2 --blockdev driver=bogus,node-name=x
        {f}/alone.qcow2 --pidfile {f}/nowhere/pid
        {f}/nowhere.qcow2 --pidfile {f}/user.txt
        {f}/alone.qcow2 --pidfile {f}/user.txt
        {f}/alone.qcow2 --pidfile {f}/folder
        {f}/nowhere.qcow2 --pidfile {f}/new.pid
        {f}/plain.raw {f}/part.raw {f}/locked.raw
    """,
    "stop": """
        -c {run}/nowhere.sock
        -c {f}/user.txt
        now
    """,
    "snapshot": """
        nosuch
        two={f}/other.raw
        vm={f}/base.raw
        vm={f}/vm.qcow2
        vm={f}/alias.qcow2
        vm={f}/nowhere/new.qcow2
        vm={f}/folder
        vm={f}/user.txt
        vm={f}/new.qcow2 nosuch={f}/new2.qcow2
        vm={f}/new.qcow2 two={f}/user.txt
        vm={f}/new.qcow2 two={f}/new.qcow2
        vm two kept
        vm two --quiesce {run}/nowhere.sock
        vm={f}/new.qcow2 --quiesce {f}/user.txt
        vm --timeout 0
        vm={f}/nowhere.qcow2 --reuse-external
        vm={f}/nowhere.qcow2 --pass-fd
        vm={f}/small.qcow2 --reuse-external
        vm={f}/alone.qcow2 --reuse-external
        vm={f}/locked.qcow2 --reuse-external
        vm={f}/moved.qcow2 busy={f}/new.qcow2 --reuse-external
        vm={tiny}
        busy={f}/new.qcow2
        ro={f}/new.qcow2 kept={f}/new2.qcow2
    """,
    "stream": """
        nosuch
        two
        ro
        kept
        vm --base nosuch.raw
        vm --base {f}/vm.qcow2
        vm --speed some
        vm --on-error some
    """,
    "commit": """
        nosuch
        two
        vm --top nosuch
        vm --base nosuch
        vm --base vm.qcow2
        vm --top base.raw
        vm --backing-file x
        vm --pivot --finish
        vm --speed -5
        kept
    """,
    "copy": """
        vm
        nosuch {f}/new.raw
        vm {f}/new.raw --format bogus
        vm {f}/nowhere/new.raw
        vm {f}/folder
        vm {f}/user.txt
        vm {f}/fifo.raw
        vm {f}/vm.qcow2
        vm {f}/alias.qcow2
        vm {f}/base.raw
        vm {f}/other.raw
        vm {f}/two.raw
        vm {f}/locked.raw
        vm {f}/moved.qcow2
        vm {f}/copied.qcow2
        vm {f}/part.raw
        vm {f}/locked.raw --reuse-external
        vm {f}/locked.qcow2 --reuse-external
        vm {f}/base.raw --reuse-external
        vm {f}/two.raw --reuse-external
        vm {f}/smaller.raw --reuse-external
        vm {f}/small.qcow2 --reuse-external
        vm {f}/nowhere.qcow2 --reuse-external
        vm {f}/user.txt --reuse-external --format qcow2
        vm {f}/new.raw --shallow
        vm {f}/new.qcow2 --shallow --chain
        vm {f}/new.qcow2 --keep nosuch
        vm {f}/vm2.qcow2 --chain --granularity 1000
        vm {f}/new.qcow2 --granularity 1000
        vm {f}/new.qcow2 --converge-by -1
        vm {f}/new.qcow2 --pivot --finish
        vm {f}/new.qcow2 --copy-mode some
        vm {f}/new.qcow2 --on-target-error some
        vm {tiny}
        vm {tiny} --format qcow2
        vm {tiny} --format raw
        vm {device} --format qed
        busy {f}/new.raw
        busy {f}/busy.copy.raw
        two {f}/busy.copy.raw
        kept {f}/new.raw
        vm nbd+unix:///a?socket={run}/nowhere.sock
        vm nbd+unix:///nosuch?socket={run}/qsd.sock
        vm nbd+unix:///vm?socket={run}/nbd.sock
        two nbd+unix:///two?socket={run}/nbd.sock
        vm nbd+unix:///two?socket={run}/nbd.sock
        vm nbd+unix:///ro?socket={run}/nbd.sock
        vm nbd://127.0.0.1:1/x
    """,
    "backup": """
        vm
        nosuch {f}/new.qcow2
        vm {f}/new.qcow2 --format bogus
        vm {f}/nowhere/new.qcow2
        vm {f}/folder
        vm {f}/user.txt
        vm {f}/fifo.raw
        vm {f}/vm.qcow2
        vm {f}/alias.qcow2
        vm {f}/base.raw
        vm {f}/other.raw
        vm {f}/locked.raw
        vm {f}/moved.qcow2
        vm {tiny} --format raw
        vm {tiny} --format qcow2
        vm {device} --format qed
        vm {f}/new.raw --compress
        vm {f}/new.raw --incremental
        vm {f}/new.qcow2 --incremental --bitmap nosuch --base {f}/base.raw
        vm {f}/new.qcow2 --incremental --bitmap b0
        vm {f}/new.qcow2 --incremental --bitmap b0 --base {f}/nowhere.qcow2
        vm {f}/new.qcow2 --incremental --bitmap b0 --base {f}/small.qcow2
        vm {f}/new.qcow2 --incremental --bitmap b0 --base {f}/locked.qcow2
        vm {f}/new.qcow2 --incremental --top
        vm {f}/new.qcow2 --scratch {f}/nowhere
        vm {f}/new.qcow2 --on-target-error some
        vm={f}/new.qcow2 nosuch={f}/new2.qcow2
        vm={f}/new.qcow2 two={f}/user.txt
        vm={f}/new.qcow2 two={f}/new.qcow2
        vm={f}/new.qcow2 two={tiny}
        vm={f}/new.qcow2 kept={f}/nowhere/new.qcow2
        vm nbd+unix:///a?socket={run}/nowhere.sock
        vm nbd+unix:///vm?socket={run}/nbd.sock
        vm nbd+unix:///two?socket={run}/nbd.sock
        two nbd+unix:///two?socket={run}/nbd.sock
        --pull nosuch
        --pull vm nosuch
        --pull vm --scratch {f}/nowhere
        --pull vm --compress
        --end
        --end --id nosuch
        --failed
    """,
    "group": """
        copy vm={f}/new.raw nosuch={f}/new2.raw
        copy vm={f}/new.raw two={f}/user.txt
        copy vm={f}/new.raw two={f}/new.raw
        copy vm={f}/new.raw two={tiny}
        copy vm={f}/new.raw kept={f}/new2.raw
        copy vm={f}/new.raw busy={f}/new2.raw
        copy vm={f}/new.raw two={f}/locked.raw
        copy vm={f}/new.raw vm={f}/new2.raw
        copy vm
        stream vm two
        stream vm nosuch
        stream vm=nosuch.raw
        commit vm two
        commit vm nosuch
        complete nosuch
        cancel nosuch
        show nosuch
        frobnicate
    """,
    "change": """
        nosuch {f}/alone.qcow2
        vm {f}/nowhere.qcow2
        vm {f}/user.txt --format qcow2
        vm {f}/locked.qcow2
        vm {f}/folder
        vm {f}/two.raw
        vm {f}/half.qcow2
        two {f}/other.raw --no-notify
        two {f}/smaller.raw --no-notify
        two {f}/nowhere.raw --no-notify
        vm {f}/alone.qcow2 --no-notify
        vm {f}/base.raw --no-notify
        busy {f}/alone.qcow2
        kept {f}/alone.qcow2
        vm nbd+unix:///vm?socket={run}/nbd.sock
        vm nbd://127.0.0.1:1/x
    """,
    "backing": """
        nosuch vm.qcow2 base.raw
        vm nosuch.qcow2 base.raw
        vm vm.qcow2 nowhere.raw
        vm vm.qcow2 other.raw
        vm vm.qcow2 vm.qcow2
        vm vm.qcow2 vm.qcow2 --unsafe
        vm vm.qcow2 alias.qcow2 --unsafe
        vm vm.qcow2 json:{{}} --unsafe
        vm base.raw other.raw
        two two.raw base.raw
        kept kept.raw base.raw
    """,
    "add": """
        {f}/nowhere.qcow2
        vm={f}/alone.qcow2
        new={f}/vm.qcow2
        new={f}/alias.qcow2
        new={f}/base.raw
        new={f}/user.txt -f qcow2
        new={f}/locked.qcow2
        new={f}/half.qcow2
        new={f}/copied.qcow2
        new={f}/folder
        new={f}/fifo.raw
        new={f}/alone.qcow2 -f bogus
        new=nbd+unix:///vm?socket={run}/nowhere.sock
        new=nbd://127.0.0.1:1/x
    """,
    "remove": """
        nosuch
        kept
        kept --force
        busy
    """,
    "limit": """
        nosuch --bps 1M
        vm --bps -1
        vm --bps-max 1M
        vm --bps 1M --bps-rd 1M
        vm --iops some
        ro --bps-wr 1M
        vm --group ""
    """,
    "lock": """
        nosuch --reason x
        vm
        vm --reason ""
        kept --reason again
    """,
    "unlock": """
        nosuch
        vm
    """,
    "locks": """
        -c {run}/nowhere.sock
        now
        --timeout 0
        --timeout nan
        --timeout 99999999999999999999
    """,
    "jobs": """
        -c {run}/nowhere.sock
        now
    """,
    "job": """
        pause nosuch
        resume nosuch
        complete nosuch
        cancel nosuch
        dismiss nosuch
        finalize nosuch
        speed nosuch 1M
        mode nosuch background
        resume j
        finalize j
        dismiss j
        speed j some
        mode j some
        frobnicate
    """,
    "tree": """
        nosuch
        -c {run}/nowhere.sock
    """,
    "qmp": """
        frobnicate
        quit x=1
        blockdev-add driver=bogus
        blockdev-create '{{"job-id":"9","options":{{}}}}'
        query-block {{
        -c {run}/nowhere.sock query-block
    """,
    "monitor": """
        frobnicate
        snapshot_blkdev nosuch {f}/new.qcow2
        drive_mirror vm {f}/user.txt
        drive_backup vm {f}/user.txt
        -c {run}/nowhere.sock info block
    """,
}

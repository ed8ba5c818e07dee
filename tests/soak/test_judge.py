"""Every verdict of the fuzzer's judge, on a script that causes it, in a process without slow imports."""

# ruff: noqa: E501  a script a line

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENDS = (
    "import sys\ndef main():\n    print('tool: in/a.json is damaged; copy it again', file=sys.stderr)\n    return 2\n"
)
MISDEEDS = {
    "it works": "def main(): open('out/a.json', 'w').write('{}')",
    "it refuses": ENDS,
    "valid files were refused": ENDS,
    "it hung: it did nothing": "import os\ndef main(): os.open('in/pipe', os.O_RDONLY)",
    "it hung: it used 1 s of CPU time": "def main():\n    while True: pass",
    "it hung: stopped after": "import time\ndef main():\n    while True: sum(range(10**4)); time.sleep(0.02)",
    "MiB more than its imports": "import time\ndef main():\n    a = b'x' * (90 << 20)\n    time.sleep(0.1)",
    "MiB more than its imports, in a worker": "import os, time\ndef main():\n    if not (child := os.fork()):\n"
    "        a = b'x' * (90 << 20)\n        time.sleep(0.1)\n        os._exit(0)\n    os.waitpid(child, 0)",
    "it ended with 3": "def main(): return 3",
    "it ended with -11": "import os\ndef main(): os.kill(os.getpid(), 11)",
    "a traceback was printed": "def main(): return 1 / 0",
    "a traceback was printed, in a worker": "import os, traceback\ndef main():\n    if not (child := os.fork()):\n"
    "        try: 1 / 0\n        except Exception: traceback.print_exc()\n        os._exit(1)\n    os.waitpid(child, 0)",
    "a traceback was printed, in a thread": "import threading\ndef main():\n    t = threading.Thread(target=lambda: 1 / 0)\n"
    "    t.start()\n    t.join()",
    "a control character": "def main(): print('\\x1b[31mred')",
    "of its processes were left": "import os, time\ndef main():\n    if not os.fork(): time.sleep(30)",
    "it wrote to ../elsewhere": "import os\ndef main():\n    open('../elsewhere', 'w').close()\n    os.remove('../elsewhere')",
    "it wrote to out/link": "import os\ndef main():\n    os.symlink('../canary/new', 'out/link')\n    open('out/link', 'w').close()",
    "it wrote to out/../in/a.json": "def main(): open('out/../in/a.json', 'a').close()",
    "it did os.rename of canary/x": "import os\ndef main(): os.rename('out/was', 'canary/x')",
    "it did os.remove of": "import os\ndef main(): os.remove('a.json', dir_fd=os.open('in', os.O_RDONLY))",
    "outside of out/ was written": "import os\ndef main():\n    if not os.fork(): os.execl('/bin/sh', 'sh', '-c', 'echo > canary/new')\n"
    "    os.wait()",
    "it ran os.system": "import os\ndef main(): os.system('true')",
    "it opened a pickle that names posix.system": "import os, pickle\ndef main(): pickle.loads(pickle.dumps(os.system))",
    "it read ../case/canary/secret.txt": "def main(): open('../case/canary/secret.txt').close()",
    "it connected to": "import socket\ndef main():\n    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n    s.connect(('192.0.2.1', 9))",
    "out/a.json is half-written": "def main(): open('out/a.json', 'w').write('{')",
    "out/a.jsonl is half-written": "def main(): open('out/a.jsonl', 'w').write('{}\\n{}')",
    "out/a.tar is half-written": "import tarfile\ndef main():\n    tarfile.open('out/a.tar', 'w').add('in/a.json')\n"
    "    open('out/a.tar', 'ab').close()",
    "half-written files are left": "def main(): open('out/a.partial', 'w').close()",
    "left behind in out/": ENDS.replace("    return", "    open('out/b.json', 'w').write('{}')\n    return"),
    "it says that it worked, and did not make a.json": "def main(): return 0",
    "the last line is no error": "import sys\ndef main():\n    print('something is wrong', file=sys.stderr)\n    return 2",
    "lines and not one paragraph": ENDS.replace("copy it", "\\n\\ncopy it"),
    "there is more than one error": ENDS.replace("'tool:", "'tool: in/b.json is damaged\\ntool:"),
    "the error speaks of the program's inside": ENDS.replace("damaged", "a NoneType"),
    "characters long": ENDS.replace("damaged'", "damaged' + 'x' * 2000 + '").replace(
        "damaged;", "damaged;' + 'x' * 2000 + '"
    ),
    "the error does not say what to do": ENDS.replace("damaged; copy it again", "bad"),
    "the error does not name in/a.json": ENDS.replace("in/a.json", "it"),
    "the error does not name in/a.json, its folder alone": ENDS.replace("in/a.json", "in"),
    "what it found does not name in/a.json": "def main(): return 1",
}
"""Verdict of the judge -> code of a tool. Text after a comma makes equal verdicts different keys."""
PROGRAM = """
import json, os, sys
from pathlib import Path
from tests.soak.fuzz import child
from tests.soak.fuzz.judge import judge, listing
from tests.soak.fuzz.stand_ins import Damage
from tests.soak.fuzz.targets import Target

root, found = Path(sys.argv[1]), {}
special = {"it hung: it did nothing": {"idle_seconds": 0.3}, "it hung: stopped after": {"wall_seconds": 0.5}}
for number, (verdict, script) in enumerate(json.loads(sys.stdin.read()).items()):
    folder = root / str(number) / "case"
    limits = child.Limits(cpu_seconds=1, peak_bytes=64 << 20, **special.get(verdict, {}))
    for name in ("in", "out", "tmp", "canary"):
        (folder / name).mkdir(parents=True)
    for name in ("in/a.json", "out/was", "canary/secret.txt"):
        (folder / name).write_text("{}")
    os.mkfifo(folder / "in" / "pipe")
    (folder.parent / "tool.py").write_text(script)
    target = Target("tool", str(folder.parent / "tool.py"), "", (), (), findings=(1,), names_findings=True)
    if verdict.startswith("it says"):
        target = Target("tool", target.script, "", (), (), makes=("a.json",))
    before = listing(folder)
    outcome = child.run(target.script, [], folder, folder, limits=limits)
    damage = None if verdict.startswith("valid") else Damage("in/a.json", "is damaged")
    found[verdict] = judge(target, outcome, before, folder, damage, limits)
print(json.dumps(found))
"""


def test_every_verdict(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        input=json.dumps(MISDEEDS),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for verdict in ("it works", "it refuses"):
        assert found.pop(verdict) == []
    missed = {verdict: said for verdict, said in found.items() if not any(verdict.split(",")[0] in one for one in said)}
    assert not missed

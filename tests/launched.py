"""Many runs for one start of `accelerate launch`: most of what a small run takes is importing.

The launched processes import everything, and then fork a child of each for every job that the test hands them; nothing
of a run is left for the next. Jobs are files in a folder that both sides know.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

SECONDS_A_JOB = 600


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port for several processes to meet at, which the system gives to nobody else meanwhile: it is bound, though
    nobody listens, and whoever sets SO_REUSEADDR, as torch's store does, may still listen there."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


class Launch:
    """The test's side: `script --serve FOLDER`, started by a launcher."""

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str], processes: int):
        self.folder, self.processes, self.jobs = folder, processes, itertools.count()
        self.output = (folder / "launcher.log").open("w")
        command = [*command, "--serve", str(folder), "--client", str(os.getpid())]
        self.process = subprocess.Popen(command, env=environment, stdout=self.output, stderr=subprocess.STDOUT)

    def run(self, options: list[str]) -> None:
        """Waits for one job; raises with what its processes have printed if one of them fails."""
        name = f"job_{next(self.jobs)}"
        ends = [self.folder / f"{name}_{rank}.code" for rank in range(self.processes)]
        deadline = time.monotonic() + SECONDS_A_JOB
        with held_port() as port:
            _write(self.folder / f"{name}.json", json.dumps({"options": options, "port": port}))
            while not all(end.exists() for end in ends) and self.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
        if [end.exists() and end.read_text() for end in ends] != ["0"] * self.processes:
            logs = [self.folder / "launcher.log", *self.folder.glob(f"{name}_*.log")]
            raise AssertionError("\n".join(f"{log.name}:\n{log.read_text()[-4000:]}" for log in logs))

    def close(self) -> None:
        _write(self.folder / f"job_{next(self.jobs)}.json", "null")
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.terminate()
        self.output.close()


def serve(folder: Path, client: int, run: Callable[[list[str]], None]) -> None:
    """The launched side, in each process: jobs as they come, until there are no more or the test is gone."""
    rank, world = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", 1))
    for number in itertools.count():
        path = folder / f"job_{number}.json"
        while not path.exists():
            os.kill(client, 0)
            time.sleep(0.05)
        job = json.loads(path.read_text())
        if job is None:
            return
        child = os.fork()
        if child == 0:
            _be(folder / f"job_{number}_{rank}.log", job, run)
        others = [folder / f"job_{number}_{other}.code" for other in range(world) if str(other) != rank]
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            time.sleep(0.05)
            if any(other.exists() and other.read_text() != "0" for other in others):
                os.kill(child, signal.SIGKILL)  # it would wait for the one that failed
        _write(folder / f"job_{number}_{rank}.code", str(os.waitstatus_to_exitcode(ended[1])))


def _be(log: Path, job: dict, run: Callable[[list[str]], None]) -> None:
    """A child's life. Its process group has a store of its own: the launcher's knows the jobs before."""
    code = 1
    with contextlib.suppress(BaseException):
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
        os.environ.update(address, TORCHELASTIC_USE_AGENT_STORE="False")
        try:
            run(job["options"])
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)

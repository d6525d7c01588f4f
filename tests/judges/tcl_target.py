"""What the suite is run against: a redis-server, a whole mesh, or an address that was given.

Invariant: whatever was started here is gone when the target is closed, ended by its pid.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

# `slotmesh up` has a shorter deadline of its own and says more when it is over.
START_LIMIT = 150
STOP_LIMIT = 60
# How the suite wants its server, whatever stands before it.
ENGINE_SETTINGS = {"enable-debug-command": "yes"}


class Target:
    """An address, and the process that serves it."""

    def __init__(self, host, port, process=None, directory=None):
        self.host, self.port = host, port
        self.process, self.directory = process, directory

    def close(self):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def executes(self) -> bool:
        """It answers a command on data."""
        try:
            with socket.create_connection((self.host, self.port), 2) as stream:
                stream.settimeout(2)
                stream.sendall(b"DEL judge:usable\r\n")
                return stream.recv(64)[:1] == b":"
        except OSError:
            return False


def given(address: str) -> Target:
    host, _, port = address.rpartition(":")
    return Target(host or "127.0.0.1", int(port))


def direct(engine: str) -> Target:
    """One redis-server of its own, as the suite's authors run it: 16 databases."""
    directory = tempfile.mkdtemp(prefix="sm-tcl-")
    port = free_port()
    command = [engine, "--port", str(port), "--save", "", "--dir", directory]
    for name, value in ENGINE_SETTINGS.items():
        command += [f"--{name}", value]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    target = Target("127.0.0.1", port, process, directory)
    wait(target, "redis-server")
    return target


def mesh(programs: Path, architecture: str, shards: int, engine: str) -> Target:
    """`slotmesh up` with one proxy, one worker and no replicas: what the suite needs of a mesh."""
    directory = tempfile.mkdtemp(prefix="sm-tcl-")
    command = [str(programs / "slotmesh"), "up", "--output", "json", "--architecture", architecture]
    command += ["--data", f"{directory}/d", "--replicas", "0", "--proxies", "1"]
    if architecture == "cluster":
        command += ["--shards", str(shards)]
    command += parameters(programs, directory, engine)
    log = open(f"{directory}/up.log", "wb")
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
    )
    line = process.stdout.readline()
    try:
        host, _, port = json.loads(line)["proxies"][0].rpartition(":")
    except ValueError:
        process.kill()
        process.wait()
        said = Path(f"{directory}/up.log").read_text(errors="replace")
        raise RuntimeError(f"slotmesh up did not start:\n{said[-2000:]}") from None
    target = Target(host, int(port), process, directory)
    wait(target, "the proxy")
    return target


def parameters(programs: Path, directory: str, engine: str) -> list:
    """Engine settings at creation where `slotmesh up` takes them, else an engine that has them."""
    help_text = subprocess.run(
        [programs / "slotmesh", "up", "--help"], capture_output=True, text=True, check=False
    ).stdout
    if "--parameter" in help_text:
        words = ["--engine", engine] if os.sep in engine else []
        for name, value in ENGINE_SETTINGS.items():
            words += ["--parameter", f"{name}={value}"]
        return words
    wrapper = Path(directory) / "engine"
    settings = " ".join(f"--{name} {value}" for name, value in ENGINE_SETTINGS.items())
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which(engine)} "$@" {settings}\n')
    wrapper.chmod(0o755)
    return ["--engine", str(wrapper)]


def wait(target: Target, what: str):
    deadline = time.monotonic() + START_LIMIT
    while not target.executes():
        if time.monotonic() > deadline or target.process.poll() is not None:
            target.close()
            raise RuntimeError(f"waited for {what} to answer")
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

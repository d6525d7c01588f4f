//! What tests do to processes: kill, freeze, look whether they are still there. Always by pid.

use std::time::Duration;

use anyhow::Context;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};
pub use slotmesh_ctl::up::process::{belongs_to, is_alive, kill_and_wait, of_directory, wait_gone};

/// SIGKILL: no process can do anything about it.
///
/// # Errors
/// When the process is gone already, or not ours.
pub fn kill(pid: u32) -> anyhow::Result<()> {
    send(pid, Signal::KILL)
}

/// SIGTERM: asks to stop.
///
/// # Errors
/// As [`kill`].
pub fn terminate(pid: u32) -> anyhow::Result<()> {
    send(pid, Signal::TERM)
}

/// SIGSTOP: the process hangs, its sockets stay open.
///
/// # Errors
/// As [`kill`].
pub fn freeze(pid: u32) -> anyhow::Result<()> {
    send(pid, Signal::STOP)
}

/// SIGCONT: ends [`freeze`].
///
/// # Errors
/// As [`kill`].
pub fn thaw(pid: u32) -> anyhow::Result<()> {
    send(pid, Signal::CONT)
}

fn send(pid: u32, signal: Signal) -> anyhow::Result<()> {
    kill_process(raw(pid)?, signal).with_context(|| format!("send {signal:?} to {pid}"))
}

fn raw(pid: u32) -> anyhow::Result<Pid> {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .with_context(|| format!("{pid} is no pid"))
}

/// Kills without asking and waits, for use in `drop`; a process that is gone is fine.
pub fn kill_blocking(pid: u32, limit: Duration) {
    let Ok(pid) = raw(pid) else { return };
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else {
        return;
    };
    // Gone between the two calls: nothing to wait for.
    if kill_process(pid, Signal::KILL).is_err() {
        return;
    }
    let timeout = Timespec::try_from(limit).ok();
    let _ = poll(&mut [PollFd::new(&handle, PollFlags::IN)], timeout.as_ref());
}

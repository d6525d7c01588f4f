//! Processes that outlive the agent: started in a group of their own, recognised again after a
//! restart, stopped with a bound.
//!
//! Invariant: a process is known by pid and start time, so a reused pid is never taken for it, and
//! nothing is killed that was not started for the same directory.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, waitpid};
use serde::{Deserialize, Serialize};
use tokio::{
    io::unix::AsyncFd,
    time::{Instant, timeout},
};

use crate::lease::Boot;

/// A crash at start is tried again soon, and for ever, but not so often that it fills a disk.
const RESTART_FIRST: Duration = Duration::from_millis(100);
const RESTART_CAP: Duration = Duration::from_secs(10);
/// In which Linux tells start times, on every architecture that is built today.
const TICKS_PER_SECOND: u64 = 100;

/// Where a process's output goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// The last start's only: it has a log of its own and prints what keeps it from starting.
    StartAnew,
    /// It logs there.
    Append,
}

/// A running process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    /// In clock ticks since boot.
    start_time: u64,
}

impl Process {
    /// Starts `program` in `dir`, with its output in the file `output` there.
    pub fn spawn(
        program: &Path,
        args: &[String],
        dir: &Path,
        output: &str,
        mode: Output,
    ) -> io::Result<Self> {
        let path = dir.join(output);
        if mode == Output::StartAnew && path.exists() {
            fs::remove_file(&path)?;
        }
        let out = OpenOptions::new().create(true).append(true).open(path)?;
        let err = out.try_clone()?;
        let child = Command::new(program)
            .args(args)
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            // Not in the agent's group: a signal from its terminal must not reach a node.
            .process_group(0)
            .spawn()?;
        // The child is not awaited through its handle but by pid, like an adopted one.
        let process = Self::find(child.id())
            .ok_or_else(|| io::Error::other("the process ended as it started"))?;
        Ok(process)
    }

    /// The live process with this pid.
    pub fn find(pid: u32) -> Option<Self> {
        Some(Self::look(pid)?.0)
    }

    /// What its main thread does, by the kernel's letter for it.
    pub fn state(&self) -> Option<char> {
        let (found, state) = Self::look(self.pid)?;
        (found == *self).then_some(state)
    }

    fn look(pid: u32) -> Option<(Self, char)> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name may contain anything, so count from its closing parenthesis.
        let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        if matches!(state, 'Z' | 'X') {
            return None;
        }
        // State was field 3; start time is field 22.
        let start_time = fields.nth(18)?.parse().ok()?;
        Some((Self { pid, start_time }, state))
    }

    /// Since it was started, to the next tick.
    pub fn age(&self) -> Duration {
        let started = Boot(self.start_time.saturating_mul(1_000) / TICKS_PER_SECOND);
        started.until(Boot::now())
    }

    /// Reads a record of [`Self::save`]; gives the process if it still runs.
    pub fn load(path: &Path) -> Option<Self> {
        let text = fs::read_to_string(path).ok()?;
        let (pid, start_time) = text.trim().split_once(' ')?;
        let recorded = Self {
            pid: pid.parse().ok()?,
            start_time: start_time.parse().ok()?,
        };
        recorded.is_alive().then_some(recorded)
    }

    pub fn save(&self, path: &Path) -> io::Result<()> {
        write_atomic(
            path,
            format!("{} {}\n", self.pid, self.start_time).as_bytes(),
            0o600,
        )
    }

    /// Collects the process if it is a child that has ended, then says if it still runs.
    pub fn is_alive(&self) -> bool {
        if let Some(pid) = self.rustix_pid() {
            let _ = waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
        }
        Self::find(self.pid).as_ref() == Some(self)
    }

    /// Whether it runs in `dir`: a node that was started there and not recorded.
    pub fn runs_in(&self, dir: &Path) -> bool {
        let cwd = fs::read_link(format!("/proc/{}/cwd", self.pid));
        matches!((cwd, dir.canonicalize()), (Ok(cwd), Ok(dir)) if cwd == dir)
    }

    /// The oldest process that works in `dir` and shows one of `marks` in its arguments: what an
    /// agent started there that died before it could record it. The directory alone is no proof,
    /// since a person's shell may work there too; younger ones are its own helpers.
    pub fn find_in(dir: &Path, marks: &[String]) -> Option<Self> {
        Self::find_other_in(dir, marks, &[])
    }

    /// As [`Process::find_in`], of those that are not known.
    pub fn find_other_in(dir: &Path, marks: &[String], known: &[Self]) -> Option<Self> {
        let entries = fs::read_dir("/proc").ok()?.flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let others = pids.filter_map(Self::find).filter(|p| !known.contains(p));
        let here = others.filter(|p| p.runs_in(dir));
        let marked = here.filter(|p| {
            let raw = fs::read(format!("/proc/{}/cmdline", p.pid)).unwrap_or_default();
            let shown = String::from_utf8_lossy(&raw);
            marks.iter().any(|mark| shown.contains(mark.as_str()))
        });
        marked.min_by_key(|p| p.start_time)
    }

    pub fn signal(&self, signal: Signal) {
        if self.is_alive()
            && let Some(pid) = self.rustix_pid()
        {
            let _ = kill_process(pid, signal);
        }
    }

    /// Waits for its end.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn ended(&self) {
        // Where the kernel gives no pidfd, look as often as a probe does.
        const LOOK_EVERY: Duration = Duration::from_millis(100);
        let fd = self.pidfd();
        while self.is_alive() {
            match &fd {
                // A pidfd is readable once the process has ended.
                Some(fd) => match fd.readable().await {
                    Ok(mut guard) => guard.clear_ready(),
                    Err(_) => tokio::time::sleep(LOOK_EVERY).await,
                },
                None => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    fn pidfd(&self) -> Option<AsyncFd<rustix::fd::OwnedFd>> {
        let fd = pidfd_open(self.rustix_pid()?, PidfdFlags::NONBLOCK).ok()?;
        // The pid may have been reused between the record and here.
        if !self.is_alive() {
            return None;
        }
        watched(fd)
    }

    /// Waits for an end that was asked for, then asks more firmly.
    pub async fn stop(&self, polite: Option<Signal>, grace: Duration) {
        if let Some(signal) = polite {
            self.signal(signal);
        }
        if timeout(grace, self.ended()).await.is_err() {
            tracing::warn!(pid = self.pid, "process did not stop in time; killed");
            self.signal(Signal::KILL);
            self.ended().await;
        }
    }

    fn rustix_pid(&self) -> Option<Pid> {
        Pid::from_raw(i32::try_from(self.pid).ok()?)
    }
}

#[allow(unsafe_code)]
fn watched(fd: rustix::fd::OwnedFd) -> Option<AsyncFd<rustix::fd::OwnedFd>> {
    // SAFETY: the descriptor is owned by the `AsyncFd`, which deregisters it before it is closed,
    // and nobody replaces or duplicates it meanwhile.
    unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) }.ok()
}

/// Replaces a file so that a reader sees the old or the new one, also after a crash.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let next = next_path(path);
    // A leftover of a crash may have another mode.
    if let Err(error) = fs::remove_file(&next)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&next)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&next, path)
}

fn next_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".next");
    path.with_file_name(name)
}

/// The last line that says something, for an operator who asks why a process ended.
pub fn last_line(path: &Path) -> String {
    let tail = last_lines(path);
    tail.lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// The end of a log; empty when there is none.
pub fn last_lines(path: &Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    const TAIL_BYTES: u64 = 2048;
    let read = || -> io::Result<String> {
        let mut file = fs::File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL_BYTES)))?;
        let mut tail = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut tail)?;
        Ok(String::from_utf8_lossy(&tail).into_owned())
    };
    read().unwrap_or_default()
}

/// Delays between starts of a process that keeps ending.
#[derive(Debug)]
pub struct Restarts {
    backoff: slotmesh_runtime::backoff::Backoff,
    started_at: Option<Instant>,
    not_before: Option<Instant>,
}

impl Default for Restarts {
    fn default() -> Self {
        let backoff = slotmesh_runtime::backoff::Backoff::new(RESTART_FIRST, RESTART_CAP);
        Self {
            backoff,
            started_at: None,
            not_before: None,
        }
    }
}

impl Restarts {
    /// Whether another start is due.
    pub fn due(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|at| now >= at)
    }

    /// Counts a start.
    pub fn started(&mut self, now: Instant) {
        // A process that lived for long ended for a new reason.
        if self
            .started_at
            .is_some_and(|at| now.duration_since(at) > RESTART_CAP)
        {
            self.backoff.reset();
        }
        self.started_at = Some(now);
        self.not_before = Some(now + self.backoff.next_delay());
    }
}

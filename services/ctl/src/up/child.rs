//! One process that `slotmesh up` keeps running: started, started again when it dies, stopped.
//!
//! The process has its own process group, so that Ctrl-C on the terminal reaches only `up`, which
//! then stops the others in the right order. It is not killed when `up` is: the next `up` takes over.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context;
use rustix::process::Signal;
use serde::Deserialize;
use slotmesh_runtime::backoff::Backoff;
use tokio::{
    process::Command,
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::process;

const RESTART_FIRST: Duration = Duration::from_millis(100);
/// Well below the time that proxies hold requests, if a switchover was under way.
const RESTART_CAP: Duration = Duration::from_secs(1);
/// A process that ran for this long died for a new reason.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// What a person wants to read of a log when something went wrong.
const TAIL_LINES: usize = 15;
const TAIL_BYTES: u64 = 8 * 1024;

/// How to run it.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    pub(super) name: String,
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    pub(super) log: PathBuf,
    /// Written by the process once its sockets are bound: `{"pid":…,"address":…}`.
    pub(super) bound_file: PathBuf,
    /// How long it may take to stop before it is killed.
    pub(super) stop_timeout: Duration,
}

/// What is known of the process now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Status {
    /// None between its death and its next start.
    pub(super) pid: Option<u32>,
    /// How often it has died, or could not be started.
    pub(super) deaths: u32,
}

/// The contents of the bound file.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Bound {
    pub(super) pid: u32,
    pub(super) address: String,
}

/// A process under supervision.
#[derive(Debug)]
pub(super) struct Child {
    spec: Spec,
    status: watch::Receiver<Status>,
    stop: CancellationToken,
    supervisor: JoinHandle<()>,
}

impl Child {
    /// Starts the process and its supervision.
    pub(super) fn start(spec: Spec) -> Self {
        let (sender, status) = watch::channel(Status::default());
        let stop = CancellationToken::new();
        let supervisor = tokio::spawn(supervise(spec.clone(), sender, stop.clone()));
        Self {
            spec,
            status,
            stop,
            supervisor,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.spec.name
    }

    pub(super) fn status(&self) -> Status {
        *self.status.borrow()
    }

    /// Where the process that runs now is reached, once it says so.
    pub(super) fn bound(&self) -> Option<Bound> {
        let pid = self.status().pid?;
        let text = fs::read_to_string(&self.spec.bound_file).ok()?;
        let bound: Bound = serde_json::from_str(&text).ok()?;
        (bound.pid == pid).then_some(bound)
    }

    /// The end of its log, for a person.
    pub(super) fn log_tail(&self) -> String {
        let tail = read_tail(&self.spec.log).unwrap_or_else(|error| format!("(no log: {error})"));
        format!("--- end of {} ---\n{tail}", self.spec.log.display())
    }

    /// Stops it and waits until it is gone, killing it when it takes too long.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        if let Err(error) = self.supervisor.await {
            warn!(name = self.spec.name, %error, "its supervision ended early");
        }
    }
}

async fn supervise(spec: Spec, status: watch::Sender<Status>, stop: CancellationToken) {
    let mut backoff = Backoff::new(RESTART_FIRST, RESTART_CAP);
    loop {
        let started = Instant::now();
        match spawn(&spec) {
            Ok(mut child) => {
                let pid = child.id();
                status.send_modify(|s| s.pid = pid);
                tokio::select! {
                    exit = child.wait() => report_death(&spec, exit),
                    () = stop.cancelled() => return end(&spec, child).await,
                }
            }
            Err(error) => warn!(
                name = spec.name,
                error = format!("{error:#}"),
                "can't start"
            ),
        }
        status.send_modify(|s| {
            *s = Status {
                pid: None,
                deaths: s.deaths + 1,
            }
        });
        if started.elapsed() >= HEALTHY_AFTER {
            backoff.reset();
        }
        tokio::select! {
            () = sleep(backoff.next_delay()) => {}
            () = stop.cancelled() => return,
        }
    }
}

fn report_death(spec: &Spec, exit: std::io::Result<ExitStatus>) {
    match exit {
        Ok(exit) => {
            warn!(name = spec.name, %exit, log = %spec.log.display(), "died, starting it again")
        }
        Err(error) => warn!(name = spec.name, %error, "lost sight of it, starting it again"),
    }
}

fn spawn(spec: &Spec) -> anyhow::Result<tokio::process::Child> {
    // What an earlier process wrote must not be taken for this one's.
    if let Err(error) = fs::remove_file(&spec.bound_file)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).context(format!("remove {}", spec.bound_file.display()));
    }
    let log = File::options()
        .create(true)
        .append(true)
        .open(&spec.log)
        .with_context(|| format!("open {}", spec.log.display()))?;
    let child = Command::new(&spec.program)
        .args(&spec.arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("share the log")?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {}", spec.program.display()))?;
    info!(name = spec.name, pid = child.id(), "started");
    Ok(child)
}

async fn end(spec: &Spec, mut child: tokio::process::Child) {
    if let Some(pid) = child.id() {
        process::send(pid, Signal::TERM);
    }
    if let Ok(exit) = timeout(spec.stop_timeout, child.wait()).await {
        match exit {
            Ok(exit) if exit.success() => info!(name = spec.name, "stopped"),
            Ok(exit) => warn!(name = spec.name, %exit, "stopped"),
            Err(error) => warn!(name = spec.name, %error, "can't wait for it"),
        }
        return;
    }
    warn!(name = spec.name, waited = ?spec.stop_timeout, "does not stop, killing it");
    if let Err(error) = child.kill().await {
        warn!(name = spec.name, %error, "can't kill it");
    }
}

fn read_tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut raw = Vec::new();
    file.read_to_end(&mut raw)?;
    let text = String::from_utf8_lossy(&raw);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(dir: &Path, script: &str) -> Spec {
        Spec {
            name: "test".into(),
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            log: dir.join("test.log"),
            bound_file: dir.join("bound.json"),
            stop_timeout: Duration::from_millis(300),
        }
    }

    async fn until(child: &Child, what: &str, reached: impl Fn(Status) -> bool) -> Status {
        let mut status = child.status.clone();
        let wait = status.wait_for(|s| reached(*s));
        let reached = timeout(Duration::from_secs(10), wait).await;
        *reached
            .unwrap_or_else(|_| panic!("waited 10 s for {what}"))
            .unwrap()
    }

    #[tokio::test]
    async fn a_process_that_dies_is_started_again() {
        let dir = tempfile::tempdir().unwrap();
        let child = Child::start(shell(dir.path(), "echo ran; exit 3"));
        until(&child, "two deaths", |s| s.deaths >= 2).await;
        assert!(
            child.log_tail().contains("ran\nran"),
            "{}",
            child.log_tail()
        );
        child.stop().await;
    }

    #[tokio::test]
    async fn a_process_that_ignores_sigterm_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let child = Child::start(shell(dir.path(), "trap '' TERM; while :; do sleep 1; done"));
        let pid = until(&child, "a start", |s| s.pid.is_some())
            .await
            .pid
            .unwrap();
        child.stop().await;
        assert!(!process::is_alive(pid));
    }

    #[tokio::test]
    async fn what_an_earlier_process_wrote_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("bound.json"),
            r#"{"pid":1,"address":"127.0.0.1:1"}"#,
        )
        .unwrap();
        let script = format!(
            "printf '{{\"pid\":%d,\"address\":\"127.0.0.1:9\"}}' $$ > {}/bound.json; sleep 60",
            dir.path().display()
        );
        let child = Child::start(shell(dir.path(), &script));
        let deadline = Instant::now() + Duration::from_secs(10);
        while child.bound().is_none() {
            assert!(Instant::now() < deadline, "waited 10 s for the bound file");
            sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(child.bound().unwrap().address, "127.0.0.1:9");
        child.stop().await;
    }
}

//! One hand-over of the proxy, however it is asked for, and what can be seen of it from outside: which
//! process its directory names, and how many clients the one before still has.
//!
//! Invariant: the one before is known before anything is asked for, so that its last client is seen to
//! go.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use prost::Message as _;
use serde::Deserialize;
use slotmesh_ctl::{
    api::Api,
    progress,
    up::process::{arguments, is_alive},
};
use slotmesh_harness::{programs, wait_until};
use slotmesh_proto::{handover::v1 as pb, instance::v1::RestartProxyRequest, task::v1::Task};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    process::{Child, Command},
    time::{Instant, timeout},
};

use crate::chaos::history::now_us;

/// For the new process to start, to try itself, and to get the listener.
const SERVE_LIMIT: Duration = Duration::from_secs(60);
/// For all clients that can come, which takes a second at most if all is well.
const SETTLE_LIMIT: Duration = Duration::from_secs(60);
/// Between looks at a file, and at a page of metrics.
const FILE_LOOK: Duration = Duration::from_millis(2);
const EMPTIED_LOOK: Duration = Duration::from_millis(10);
/// So long without a client that goes, and those that are left are left.
const STILL: Duration = Duration::from_millis(1_500);
/// A spare answers once everybody has come back.
const BACK_LIMIT: Duration = Duration::from_secs(60);
/// Of a task that restarts one proxy.
const TASK_LIMIT: Duration = Duration::from_secs(180);
/// A proxy's page of metrics.
const SCRAPE_LIMIT: Duration = Duration::from_secs(5);
/// An answer of a spare is a few words.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// How a hand-over is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum By {
    /// A new process is started with `--take-over`, and every second hand-over goes back to the spare.
    Hand,
    /// A new process is started with `--take-over` each time.
    Fresh,
    /// By tasks of kind RestartProxy, as an operator would.
    Task,
}

/// What proxy.json says.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Bound {
    pub(super) pid: u32,
    pub(super) address: String,
    pub(super) admin_address: String,
    pub(super) handover: PathBuf,
}

/// What take-over.json says.
#[derive(Debug, Deserialize)]
struct TakeOver {
    pid: u32,
    phase: String,
    serving_unix_ms: u64,
    settled_unix_ms: u64,
}

/// What was seen of one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    /// It was asked for.
    pub(super) asked_us: u64,
    /// Another process had the listener.
    pub(super) serving_us: u64,
    /// The last client that could go had gone.
    pub(super) settled_us: u64,
    /// Clients that stayed behind.
    pub(super) left: u64,
    /// Longest time that one which went was served by neither process, as the one before says; 0: it does
    /// not say.
    pub(super) stopped_us: u64,
}

/// The proxy of the mesh, whichever process it is.
#[derive(Debug)]
pub(super) struct Proxy {
    dir: PathBuf,
    id: String,
    instance: String,
    api: Api,
    by: By,
    /// Where the process before is asked to take back, if it is a spare.
    spare: Option<(u32, PathBuf)>,
    /// Processes that this one started: they are this one's to reap.
    children: Vec<Child>,
}

impl Proxy {
    /// The proxy at this address, below an agents' directory.
    pub(super) fn find(
        hosts: &Path,
        address: &str,
        instance: &str,
        api: Api,
        by: By,
    ) -> anyhow::Result<Self> {
        let inside = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten();
        let is_it = |dir: &PathBuf| bound(dir).is_ok_and(|bound| bound.address == address);
        let found = inside(hosts.to_owned())
            .flat_map(|host| inside(host.path().join("proxies")))
            .map(|proxy| proxy.path())
            .find(is_it);
        let dir = found.with_context(|| format!("no proxy of {address} in {}", hosts.display()))?;
        let id = dir.file_name().context("a proxy's directory has a name")?;
        Ok(Self {
            id: id.to_string_lossy().into_owned(),
            dir,
            instance: instance.to_owned(),
            api,
            by,
            spare: None,
            children: Vec::new(),
        })
    }

    pub(super) fn bound(&self) -> anyhow::Result<Bound> {
        bound(&self.dir)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts a process that takes over from this one; its pid.
    pub(super) fn begin(&mut self, before: &Bound) -> anyhow::Result<u32> {
        self.reap();
        let child = self.start(before)?;
        let pid = child.id().context("it has a pid until it is waited for")?;
        self.children.push(child);
        Ok(pid)
    }

    fn reap(&mut self) {
        self.children
            .retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
    }

    /// Hands over once.
    ///
    /// # Errors
    /// When no other process serves in time, or what was asked to do it says that it failed.
    pub(super) async fn hand_over(&mut self) -> anyhow::Result<Seen> {
        self.reap();
        let before = self.bound()?;
        let asked_us = now_us();
        let spare = self.spare.take().filter(|(pid, _)| is_alive(*pid));
        let mut asked = match (self.by, spare) {
            (By::Hand, Some((_, door))) => Asked::Back(tokio::spawn(take_back(door))),
            (By::Hand | By::Fresh, _) => {
                self.begin(&before)?;
                Asked::Process
            }
            (By::Task, _) => Asked::Task(self.restart().await?),
        };
        let was_back = matches!(asked, Asked::Back(_));
        let named_us = self.other_serves(&before, &mut asked).await?;
        let (serving_us, settled_us, left) = self.settled(&before).await?;
        let serving_us = serving_us.unwrap_or(named_us);
        let stopped_us = stopped_us(&before.admin_address).await;
        match asked {
            Asked::Process | Asked::Answered => {}
            Asked::Back(answer) => answer.await??,
            Asked::Task(task_id) => self.done(&task_id).await?,
        }
        if self.by == By::Hand && !was_back {
            self.spare = Some((before.pid, before.handover));
        }
        Ok(Seen {
            asked_us,
            serving_us,
            settled_us,
            left,
            stopped_us,
        })
    }

    /// Another process with the same arguments, in the same directory.
    fn start(&self, before: &Bound) -> anyhow::Result<Child> {
        let mut arguments = arguments(before.pid).into_iter().skip(1).peekable();
        let mut command = Command::new(programs::path("slotmesh-proxy")?);
        while let Some(argument) = arguments.next() {
            if argument == "--take-over" {
                arguments.next();
            } else {
                command.arg(argument);
            }
        }
        let log = std::fs::File::options()
            .append(true)
            .create(true)
            .open(self.dir.join("proxy.log"))?;
        command
            .arg("--take-over")
            .arg(&before.handover)
            .current_dir(&self.dir)
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        command.spawn().context("start slotmesh-proxy")
    }

    async fn restart(&self) -> anyhow::Result<String> {
        let request = RestartProxyRequest {
            instance_id: self.instance.clone(),
            proxy_instance_ids: vec![self.id.clone()],
            client_token: Api::token(None),
            bake_seconds: Some(0),
            ..RestartProxyRequest::default()
        };
        let answer = self.api.instances().restart_proxy(request).await;
        Ok(answer.context("restart the proxy")?.into_inner().task_id)
    }

    async fn done(&self, task_id: &str) -> anyhow::Result<()> {
        let ended = wait_until(TASK_LIMIT, "the restart's end", async || {
            let task: Task = self.api.clone().task(task_id).await?;
            let has_ended = progress::has_ended(task.state());
            anyhow::ensure!(has_ended, "{:?} {}", task.state(), task.message);
            Ok(task)
        });
        Ok(progress::require_done(&ended.await?)?)
    }

    /// When another process had the listener.
    async fn other_serves(&mut self, before: &Bound, asked: &mut Asked) -> anyhow::Result<u64> {
        let deadline = Instant::now() + SERVE_LIMIT;
        loop {
            if self.bound().is_ok_and(|now| now.pid != before.pid) {
                return Ok(now_us());
            }
            match asked {
                Asked::Process => self.still_tries()?,
                Asked::Back(answer) if answer.is_finished() => {
                    answer.await??;
                    *asked = Asked::Answered;
                }
                _ => {}
            }
            if Instant::now() >= deadline {
                if let Asked::Task(task_id) = asked {
                    self.done(task_id).await?;
                }
                bail!(
                    "no other process serves after {SERVE_LIMIT:?}: {}",
                    self.last_words()
                );
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// When another process had the listener, when the last client had come that could, and how many are
    /// left. The new process says when, in a file: a page of metrics of the one before costs it more than
    /// some clients do, and proxy.json is written when its disk has time.
    async fn settled(&self, before: &Bound) -> anyhow::Result<(Option<u64>, u64, u64)> {
        let deadline = Instant::now() + SETTLE_LIMIT;
        let mut said = None;
        while said.is_none() && Instant::now() < deadline {
            tokio::time::sleep(FILE_LOOK).await;
            said = self.take_over_of_other_than(before);
        }
        let (emptied_us, left) = emptied(before).await?;
        let said_us = said.map(|said| {
            let us =
                |unix_ms: u64| now_us().saturating_sub(unix_us().saturating_sub(unix_ms * 1_000));
            (us(said.serving_unix_ms), us(said.settled_unix_ms))
        });
        Ok(match (said_us, left) {
            (Some((serving_us, settled_us)), 0) => (Some(serving_us), settled_us, 0),
            (said_us, _) => (said_us.map(|said| said.0), emptied_us, left),
        })
    }

    /// What another process than the one before says, once everybody has come to it.
    fn take_over_of_other_than(&self, before: &Bound) -> Option<TakeOver> {
        let text = std::fs::read(self.dir.join("take-over.json")).ok()?;
        let said: TakeOver = serde_json::from_slice(&text).ok()?;
        (said.pid != before.pid && said.phase == "done").then_some(said)
    }

    /// The process that was started last has not given up.
    fn still_tries(&mut self) -> anyhow::Result<()> {
        let newest = self.children.last_mut().map(Child::try_wait);
        match newest.transpose()?.flatten() {
            Some(status) => bail!("the new process ended with {status}: {}", self.last_words()),
            None => Ok(()),
        }
    }

    pub(super) fn last_words(&self) -> String {
        let log = std::fs::read_to_string(self.dir.join("proxy.log")).unwrap_or_default();
        log.lines().last().unwrap_or_default().to_owned()
    }
}

/// What is still to answer.
#[derive(Debug)]
enum Asked {
    Process,
    Answered,
    Back(tokio::task::JoinHandle<anyhow::Result<()>>),
    Task(String),
}

fn bound(dir: &Path) -> anyhow::Result<Bound> {
    let path = dir.join("proxy.json");
    let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))
}

/// When the last client went that could, and how many are left, as the process before says.
async fn emptied(before: &Bound) -> anyhow::Result<(u64, u64)> {
    let deadline = Instant::now() + SETTLE_LIMIT;
    let (mut least, mut since, mut since_us) = (u64::MAX, Instant::now(), now_us());
    loop {
        let now = match clients(&before.admin_address).await {
            Ok(now) => now,
            // With nobody left it may end.
            Err(_) if !is_alive(before.pid) => 0,
            Err(error) => return Err(error),
        };
        if now < least {
            (least, since, since_us) = (now, Instant::now(), now_us());
        }
        if least == 0 || since.elapsed() >= STILL {
            return Ok((since_us, least));
        }
        if Instant::now() >= deadline {
            bail!("clients still leave after {SETTLE_LIMIT:?}, {least} are there");
        }
        tokio::time::sleep(EMPTIED_LOOK).await;
    }
}

/// For how long a client was stopped at most, by the process that gave it.
async fn stopped_us(admin: &str) -> u64 {
    let page = scrape(admin).await.unwrap_or_default();
    metric(&page, "slotmesh_proxy_handover_stopped_max_us").unwrap_or_default()
}

fn unix_us() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default().as_micros() as u64
}

/// How many a process has.
pub(super) async fn clients(admin: &str) -> anyhow::Result<u64> {
    let text = scrape(admin).await?;
    metric(&text, "slotmesh_proxy_clients")
        .context("the proxy does not say how many clients it has")
}

/// A page of metrics.
pub(super) async fn scrape(admin: &str) -> anyhow::Result<String> {
    let read = async {
        let mut stream = TcpStream::connect(admin).await?;
        let request = "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        std::io::Result::Ok(text)
    };
    timeout(SCRAPE_LIMIT, read)
        .await
        .with_context(|| format!("no metrics at {admin} in {SCRAPE_LIMIT:?}"))?
        .with_context(|| format!("read the metrics at {admin}"))
}

pub(super) fn metric(page: &str, name: &str) -> Option<u64> {
    let value = |line: &str| {
        let rest = line.strip_prefix(name)?;
        let is_it = rest.starts_with(['{', ' ']);
        let number: f64 = rest.rsplit(' ').next()?.parse().ok()?;
        is_it.then_some(number as u64)
    };
    page.lines().find_map(value)
}

/// Asks a spare to serve again.
pub(super) async fn take_back(door: PathBuf) -> anyhow::Result<()> {
    let asked = async {
        let mut stream = UnixStream::connect(&door).await?;
        let message = pb::ToGiver {
            message: Some(pb::to_giver::Message::TakeBack(pb::TakeBack {})),
        };
        let body = message.encode_to_vec();
        stream.write_u32(u32::try_from(body.len())?).await?;
        stream.write_all(&body).await?;
        let len = stream.read_u32().await? as usize;
        anyhow::ensure!(len <= ANSWER_BYTES_MAX, "an answer of {len} bytes");
        let mut body = vec![0; len];
        stream.read_exact(&mut body).await?;
        match pb::ToTaker::decode(&body[..])?.message {
            Some(pb::to_taker::Message::TakenBack(answer)) if answer.problem.is_empty() => Ok(()),
            Some(pb::to_taker::Message::TakenBack(answer)) => bail!("{}", answer.problem),
            other => bail!("an unexpected answer: {other:?}"),
        }
    };
    let answered = timeout(BACK_LIMIT, asked).await;
    answered
        .with_context(|| format!("no answer in {BACK_LIMIT:?}"))?
        .context("ask the spare to take back")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_found_by_its_whole_name() {
        let page = "# HELP x\nslotmesh_proxy_clients_max{a=\"b\"} 7\n\
                    slotmesh_proxy_clients{otel_scope_name=\"p\"} 11000\n";
        assert_eq!(metric(page, "slotmesh_proxy_clients"), Some(11_000));
        assert_eq!(metric(page, "slotmesh_proxy"), None);
    }
}

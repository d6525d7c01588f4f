//! C5: MONITOR of every node process, from its start to its end: who accepted which writes, and when.
//!
//! Invariant: a process is attached to as soon as its socket answers, and what came before is never
//! guessed: an attachment that finds a proxy's user there already is counted as a late one. Nothing
//! here grows with the number of writes.

mod admin;
pub mod epochs;
mod line;
pub mod tracker;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use self::{
    admin::{Admin, NodeFiles},
    epochs::Epochs,
    tracker::{Accepted, Heard, Tracker},
};
use super::{
    check::{Checked, Finding},
    history::now_us,
};

/// Between two attempts at a socket that does not answer: a process has its first user later.
const ATTACH_PAUSE: Duration = Duration::from_millis(3);
/// Between two looks for nodes that are new.
const SCAN_PAUSE: Duration = Duration::from_millis(100);
/// Between two questions who a connection is; sooner, and a loaded node would notice.
const ASK_PAUSE: Duration = Duration::from_millis(25);
/// Without new connections, so often what is gone is forgotten.
const FORGET_PAUSE_US: u64 = 5_000_000;
/// For what is still on its way when the run ends.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// A MONITOR line longer than that is none of the load.
const LINE_BYTES_MAX: usize = 1 << 20;
/// A check that heard less of what was acknowledged than this has not looked.
const HEARD_PERCENT_MIN: u64 = 95;
/// Processes whose last lines are kept in memory until the verdict.
const EVIDENCE_PROCESSES: usize = 64;

/// One node process, as it was watched.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Life {
    /// Of which shard.
    pub shard: String,
    /// Its node.
    pub node: String,
    /// The process.
    pub run_id: String,
    /// Watched since then.
    pub since_us: u64,
    /// Its connection ended then; `None`: it lives.
    pub ended_us: Option<u64>,
    /// A proxy's user was there before we were, and the load before both.
    pub late: bool,
    /// First and last write accepted at an epoch.
    pub epochs: BTreeMap<u64, (u64, u64)>,
}

/// What all readers have seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Per shard: by epoch and process.
    pub writers: Epochs,
    /// Per proxy's address and shard, `address shard`: by epoch.
    pub routed: Epochs,
    /// Every process, in the order of their ends.
    pub lives: Vec<Life>,
    /// Writes of connections that were gone before they were known.
    pub unplaced: u64,
    /// Writes placed by our clock.
    pub rough: u64,
    /// Writes of processes that had just woken up.
    pub woken: u64,
    /// Lines of any kind.
    pub lines: u64,
    /// The load has begun: what comes before an attachment is lost from now on.
    pub loaded: bool,
    evidence: Vec<(String, Vec<String>)>,
}

impl Seen {
    /// Takes what a process did.
    pub fn end(&mut self, mut life: Life, accepted: Accepted) {
        for ((proxy, epoch), span) in accepted.spans {
            let ends = (span.first.hi_us, span.last.lo_us);
            let known = life.epochs.entry(epoch).or_insert(ends);
            *known = (known.0.min(ends.0), known.1.max(ends.1));
            let route = format!("{proxy} {}", life.shard);
            self.routed.note(&route, epoch, "", span.clone());
            let process = format!("{} ({})", life.node, life.run_id);
            self.writers.note(&life.shard, epoch, &process, span);
        }
        self.unplaced += accepted.unplaced;
        self.rough += accepted.rough;
        self.woken += accepted.woken;
        self.lines += accepted.lines;
        if self.evidence.len() >= EVIDENCE_PROCESSES {
            self.evidence.remove(0);
        }
        let name = format!("{}-{}", life.node, life.run_id);
        self.evidence.push((name, accepted.evidence.into()));
        self.lives.push(life);
    }

    /// C5: one writer at a time, in the order of epochs. What clients know to have been executed must
    /// have been heard, but for what processes took with them.
    #[must_use]
    pub fn judge(&self, acked: u64) -> (Vec<Finding>, Checked) {
        let count = |of: fn(&Life) -> bool| self.lives.iter().filter(|l| of(l)).count();
        let heard = self.writers.writes();
        let mut findings = self.writers.judge("C5 two processes accepted writes");
        if heard * 100 < acked * HEARD_PERCENT_MIN {
            findings.push(Finding {
                check: "C5 too little was heard",
                broken: true,
                what: format!("{heard} writes, and {acked} were acknowledged"),
                count: 1,
            });
        }
        let checked = Checked {
            check: "C5 writers",
            examined: heard,
            of: format!(
                "writes of proxies ({acked} were acknowledged) at {} epochs, in {} lines of {} \
                 processes; {} on connections too short to place; {} placed by our clock; {} of \
                 processes that had just woken up; {} \
                 processes may have accepted some before they were watched; {} ended, and may have \
                 taken their last lines with them",
                self.writers.epochs(),
                self.lines,
                self.lives.len(),
                self.unplaced,
                self.rough,
                self.woken,
                count(|l| l.late),
                count(|l| l.ended_us.is_some()),
            ),
        };
        (findings, checked)
    }

    /// Writes the last lines of the last processes, one file each.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn save(&self, dir: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(dir)?;
        for (name, lines) in &self.evidence {
            std::fs::write(dir.join(name), lines.join("\n"))?;
        }
        Ok(())
    }
}

type Shared = Arc<Mutex<Seen>>;
/// Nodes that are watched now.
type Attached = Arc<Mutex<BTreeSet<String>>>;

fn lock(seen: &Shared) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The readers of a run.
#[derive(Debug)]
pub(super) struct Monitors {
    seen: Shared,
    attached: Attached,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Monitors {
    /// Watches every node of these hosts' data directories, and those that come.
    #[must_use]
    pub(super) fn start(hosts: Vec<PathBuf>) -> Self {
        let (seen, stop) = (Shared::default(), CancellationToken::new());
        let attached = Arc::default();
        let watch = watch(hosts, seen.clone(), Arc::clone(&attached), stop.clone());
        Self {
            seen,
            attached,
            stop,
            task: tokio::spawn(watch),
        }
    }

    /// The load begins.
    pub(super) fn load_begins(&self) {
        lock(&self.seen).loaded = true;
    }

    /// How many nodes are watched now.
    #[must_use]
    pub(super) fn attached(&self) -> usize {
        let attached = self.attached.lock();
        attached.unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Ends, and gives what was seen.
    ///
    /// # Errors
    /// When a reader died.
    pub(super) async fn end(self) -> anyhow::Result<Seen> {
        self.stop.cancel();
        self.task.await?;
        Ok(std::mem::take(&mut *lock(&self.seen)))
    }
}

async fn watch(hosts: Vec<PathBuf>, seen: Shared, attached: Attached, stop: CancellationToken) {
    let mut known = BTreeSet::new();
    let mut readers = JoinSet::new();
    while !stop.is_cancelled() {
        for dir in hosts.iter().flat_map(|host| nodes_of(host)) {
            if !known.contains(&dir)
                && let Some(files) = NodeFiles::of(&dir)
            {
                known.insert(dir);
                let reader = Reader {
                    files,
                    seen: seen.clone(),
                    attached: Arc::clone(&attached),
                    stop: stop.clone(),
                };
                readers.spawn(reader.run());
            }
        }
        pause(&stop, SCAN_PAUSE).await;
    }
    // Each ends within its last words.
    while readers.join_next().await.is_some() {}
}

async fn pause(stop: &CancellationToken, how_long: Duration) {
    let _ = timeout(how_long, stop.cancelled()).await;
}

fn nodes_of(host: &Path) -> Vec<PathBuf> {
    let found = std::fs::read_dir(host.join("nodes"));
    let entries = found.into_iter().flatten().flatten();
    entries.map(|e| e.path()).collect()
}

struct Reader {
    files: NodeFiles,
    seen: Shared,
    attached: Attached,
    stop: CancellationToken,
}

type Asking =
    Pin<Box<dyn Future<Output = anyhow::Result<(Admin, u64, HashMap<String, String>)>> + Send>>;

fn asking(mut admin: Admin, number: u64) -> Asking {
    Box::pin(async move {
        let users = admin.users().await?;
        Ok((admin, number, users))
    })
}

impl Reader {
    async fn run(self) {
        while !self.stop.is_cancelled() {
            // A process that stands still answers when it is thawed, or dies.
            let opened = tokio::select! {
                () = self.stop.cancelled() => return,
                opened = self.open() => opened,
            };
            if let Ok((life, monitor, lister)) = opened {
                self.mark(true);
                self.follow(life, monitor, lister).await;
                self.mark(false);
            }
            pause(&self.stop, ATTACH_PAUSE).await;
            if !self.files.exists() {
                // Removed from its host; it may come back.
                pause(&self.stop, SCAN_PAUSE).await;
            }
        }
    }

    fn mark(&self, on: bool) {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        if on {
            attached.insert(self.files.node.clone());
        } else {
            attached.remove(&self.files.node);
        }
    }

    async fn open(&self) -> anyhow::Result<(Life, Admin, Admin)> {
        let (mut monitor, mut lister) = (self.files.connect().await?, self.files.connect().await?);
        let run_id = monitor.run_id().await?;
        anyhow::ensure!(run_id == lister.run_id().await?, "it was started again");
        monitor.ask("MONITOR").await?;
        let since_us = now_us();
        // Only now: a user that is not there yet has written nothing that we did not hear.
        let late = lock(&self.seen).loaded;
        let late = lister.has_proxy_user().await? && late;
        let life = Life {
            shard: self.files.shard.clone(),
            node: self.files.node.clone(),
            run_id,
            since_us,
            late,
            ..Life::default()
        };
        Ok((life, monitor, lister))
    }

    /// To the process's end, or the run's.
    async fn follow(&self, mut life: Life, mut monitor: Admin, lister: Admin) {
        let mut tracker = Tracker::default();
        let mut heard = Heard {
            since_us: life.since_us,
            at_us: life.since_us,
            wall_ahead_us: wall_us().saturating_sub(now_us()),
        };
        let mut pending = Vec::new();
        let (mut idle, mut listing): (Option<Admin>, Option<Asking>) = (Some(lister), None);
        let mut asks = tokio::time::interval(ASK_PAUSE);
        asks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last_asked_us = now_us();
        loop {
            tokio::select! {
                biased;
                Some(listed) = answer(&mut listing) => {
                    listing = None;
                    if let Ok((admin, number, users)) = listed {
                        tracker.listed(number, &users);
                        idle = Some(admin);
                    }
                }
                _ = asks.tick() => {
                    let forget = now_us() > last_asked_us + FORGET_PAUSE_US;
                    if (tracker.is_curious() || forget) && let Some(admin) = idle.take() {
                        last_asked_us = now_us();
                        listing = Some(asking(admin, tracker.ask()));
                    }
                }
                () = self.stop.cancelled() => {
                    self.last_words(&mut tracker, listing, idle).await;
                    break;
                }
                more = monitor.read(&mut pending) => {
                    heard = Heard { since_us: heard.at_us, at_us: now_us(), ..heard };
                    take_lines(&mut pending, |line| tracker.line(line, heard));
                    if !more.unwrap_or(false) {
                        life.ended_us = Some(heard.at_us);
                        break;
                    }
                }
            }
        }
        lock(&self.seen).end(life, tracker.end());
    }

    /// The load has ended: only who its last connections were is missing.
    async fn last_words(
        &self,
        tracker: &mut Tracker,
        listing: Option<Asking>,
        idle: Option<Admin>,
    ) {
        let known = timeout(LAST_WORDS, async {
            let admin = match (idle, listing) {
                (Some(admin), _) => admin,
                (None, Some(listing)) => listing.await?.0,
                (None, None) => anyhow::bail!("the process does not answer"),
            };
            asking(admin, tracker.ask()).await
        });
        if let Ok(Ok((_, number, users))) = known.await {
            tracker.listed(number, &users);
        }
    }
}

async fn answer(
    listing: &mut Option<Asking>,
) -> Option<anyhow::Result<(Admin, u64, HashMap<String, String>)>> {
    match listing {
        Some(listing) => Some(listing.await),
        None => None,
    }
}

/// Gives each whole line, and keeps the rest.
fn take_lines(pending: &mut Vec<u8>, mut line: impl FnMut(&str)) {
    let mut from = 0;
    while let Some(length) = pending[from..].iter().position(|b| *b == b'\n') {
        let text = String::from_utf8_lossy(&pending[from..from + length]);
        line(text.trim_end_matches('\r'));
        from += length + 1;
    }
    pending.drain(..from);
    if pending.len() > LINE_BYTES_MAX {
        pending.clear();
    }
}

fn wall_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1_000
}

#[cfg(test)]
mod tests {
    use super::{
        epochs::{Moment, Span},
        *,
    };

    fn life(run_id: &str, epoch: u64, from_us: u64, to_us: u64) -> (Life, Accepted) {
        let life = Life {
            shard: "s".into(),
            run_id: run_id.into(),
            ..Life::default()
        };
        let mut span = Span::of(Moment::at(from_us), "first");
        span.add(Moment::at(to_us), "last");
        let accepted = Accepted {
            spans: [(("1.1.1.1".to_owned(), epoch), span)].into(),
            ..Accepted::default()
        };
        (life, accepted)
    }

    fn broken(lives: Vec<(Life, Accepted)>, acked: u64) -> Vec<&'static str> {
        let mut seen = Seen::default();
        for (life, accepted) in lives {
            seen.end(life, accepted);
        }
        seen.judge(acked).0.iter().map(|f| f.check).collect()
    }

    #[test]
    fn two_processes_that_accept_writes_at_a_time_are_found() {
        let fine = vec![life("a", 1, 10, 20), life("b", 2, 30, 40)];
        assert!(broken(fine, 4).is_empty());
        let both = vec![life("b", 2, 30, 40), life("a", 1, 10, 35)];
        assert_eq!(broken(both, 4), ["C5 two processes accepted writes"]);
    }

    #[test]
    fn a_watcher_that_missed_most_of_it_has_shown_nothing() {
        let some = vec![life("a", 1, 10, 20)];
        assert_eq!(broken(some, 1_000), ["C5 too little was heard"]);
        let (_, nothing) = Seen::default().judge(0);
        assert_eq!(nothing.examined, 0);
    }

    #[test]
    fn lines_come_out_whole_whatever_the_pieces_are() {
        let mut lines = Vec::new();
        let mut pending = Vec::new();
        for piece in ["+a", "b\r\n+c\r\n+", "d\r\n"] {
            pending.extend_from_slice(piece.as_bytes());
            take_lines(&mut pending, |line| lines.push(line.to_owned()));
        }
        assert_eq!(lines, ["+ab", "+c", "+d"]);
        assert!(pending.is_empty());
    }
}

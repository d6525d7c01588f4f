//! A primary's backlog follows what is written, so that a replica that restarts goes on where it was.
//!
//! Invariants: it only grows, and not beyond its share of the memory; it is left alone where an operator
//! has set it; and it changes only while every replica is fed, since an older engine forgets what it holds
//! when the size changes.

use tokio::time::{Duration, Instant};

use super::Worker;
use crate::probe::Info;

const NAME: &str = "repl-backlog-size";
/// Of a measurement: a burst of a second is no reason to hold memory for ever.
const WINDOW: Duration = Duration::from_secs(10);
/// That a replica may take to save, stop, start and load while nothing is lost for it.
const AWAY_S: u64 = 60;
/// Most of it: what is written faster than 17 MB/s for longer is copied.
const SIZE_MAX: u64 = 1 << 30;
/// Part of the memory that it may take: an engine counts it among its data (maxmemory).
const PART: u64 = 32;

/// Of one process.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    /// When the window began, and where the stream was.
    began: Option<(Instant, u64)>,
}

impl Backlog {
    /// What the stream now at `offset` asks for in bytes, at the end of a window.
    fn wanted(&mut self, offset: u64, now: Instant) -> Option<u64> {
        let Some((began, before)) = self.began else {
            self.began = Some((now, offset));
            return None;
        };
        let passed = now.duration_since(began);
        if passed < WINDOW {
            return None;
        }
        self.began = Some((now, offset));
        let written = u128::from(offset.saturating_sub(before));
        let wanted = written * u128::from(AWAY_S) * 1_000 / passed.as_millis().max(1);
        Some(u64::try_from(wanted).unwrap_or(u64::MAX))
    }
}

/// What the memory allows, in bytes.
fn most(info: &Info) -> u64 {
    let memory = match info.number("maxmemory") {
        0 => info.number("total_system_memory"),
        bytes => bytes,
    };
    SIZE_MAX.min(memory / PART)
}

/// The size that it should be given, in bytes; `None`: it has enough, or can't have more.
fn larger(wanted: u64, info: &Info) -> Option<u64> {
    let size = info.number("repl_backlog_size");
    // In powers of two, so that it changes seldom.
    let next = wanted.min(SIZE_MAX).next_power_of_two().min(most(info));
    (wanted > size && next > size).then_some(next)
}

/// So many replicas are fed by their stream.
fn fed(info: &Info) -> usize {
    let slaves = info.number("connected_slaves");
    let is_online = |no: &u64| info.text(&format!("slave{no}")).contains("state=online");
    (0..slaves).filter(is_online).count()
}

impl Worker {
    /// Once in a window the backlog is made as large as what is written asks for.
    pub(super) async fn fit_backlog(&mut self, info: &Info) {
        if self.leading_epoch() == 0 {
            self.run.backlog = Backlog::default();
            return;
        }
        let wanted = self.run.backlog.wanted(info.offset(), Instant::now());
        let Some(size) = wanted.and_then(|wanted| larger(wanted, info)) else {
            return;
        };
        let replicas = self.report.replication_users.len();
        if self.run.parameters.contains_key(NAME) || fed(info) < replicas {
            return;
        }
        let Some(control) = self.admin().await else {
            return;
        };
        let bytes = size.to_string();
        match control.call(&["CONFIG", "SET", NAME, &bytes]).await {
            Ok(_) => tracing::info!(node = %self.node_id, bytes = size, "backlog enlarged"),
            Err(error) => tracing::warn!(node = %self.node_id, %error, "backlog not enlarged"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;

    fn info(size: u64, memory: &str) -> Info {
        Info::parse(&format!(
            "role:master\r\nconnected_slaves:2\r\nslave0:ip=a,port=1,state=online,offset=1,lag=0\r\n\
             slave1:ip=b,port=1,state=wait_bgsave,offset=0,lag=0\r\nrepl_backlog_size:{size}\r\n\
             {memory}\r\n"
        ))
    }

    #[test]
    fn it_holds_a_minute_of_what_a_window_has_written() {
        let (mut backlog, now) = (Backlog::default(), Instant::now());
        assert_eq!(backlog.wanted(5 * MB, now), None);
        assert_eq!(backlog.wanted(900 * MB, now + WINDOW / 2), None);
        assert_eq!(backlog.wanted(25 * MB, now + WINDOW), Some(120 * MB));
        assert_eq!(backlog.wanted(25 * MB, now + WINDOW * 2), Some(0));
        // Another history of the same process.
        assert_eq!(backlog.wanted(0, now + WINDOW * 3), Some(0));
    }

    #[test]
    fn it_only_grows_and_not_beyond_its_share_of_the_memory() {
        let roomy = "maxmemory:0\r\ntotal_system_memory:68719476736";
        let of = |wanted, size, memory| larger(wanted, &info(size, memory));
        assert_eq!(of(120 * MB, 64 * MB, roomy), Some(128 * MB));
        assert_eq!(of(60 * MB, 64 * MB, roomy), None);
        assert_eq!(of(60 * MB, 128 * MB, roomy), None, "never smaller");
        assert_eq!(of(u64::MAX, 64 * MB, roomy), Some(SIZE_MAX));
        assert_eq!(of(u64::MAX, SIZE_MAX, roomy), None);
        let small = "maxmemory:3221225472\r\ntotal_system_memory:68719476736";
        assert_eq!(of(200 * MB, 64 * MB, small), Some(96 * MB));
        assert_eq!(of(200 * MB, 96 * MB, small), None);
        assert_eq!(of(200 * MB, 64 * MB, "maxmemory:1000"), None);
    }

    #[test]
    fn a_replica_that_copies_is_not_fed_yet() {
        assert_eq!(fed(&info(1, "")), 1);
    }
}

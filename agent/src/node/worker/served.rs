//! What a primary's commands cost it: windows of the engine's own count.
//!
//! The engine measures each command anyway, so nothing is added to what a request costs. Invariant: a
//! window is of one process with one epoch's rights from its begin to its end; a replica is not measured.

use std::collections::BTreeMap;

use slotmesh_proto::{
    agent::v1::ServedWindow,
    store::v1::{CommandCost, NodeRole},
};
use tokio::time::{Duration, Instant};

use super::Worker;
use crate::probe::Info;

/// Of a window: long enough that one stall of the machine is little of it.
const WINDOW: Duration = Duration::from_secs(10);
/// That are reported: two in a row say that something lasts.
const WINDOWS: usize = 2;
/// Of a window: few applications use more, and rare ones say nothing about an engine.
const COMMANDS_MAX: usize = 16;

/// Their time is what they wait for, or that of other commands, which are counted themselves; or they are
/// the mesh's own.
const NOT_COUNTED: [&str; 42] = [
    "acl",
    "auth",
    "bgrewriteaof",
    "bgsave",
    "blmove",
    "blmpop",
    "blpop",
    "brpop",
    "brpoplpush",
    "bzmpop",
    "bzpopmax",
    "bzpopmin",
    "client",
    "command",
    "config",
    "debug",
    "eval",
    "eval_ro",
    "evalsha",
    "evalsha_ro",
    "exec",
    "failover",
    "fcall",
    "fcall_ro",
    "function",
    "hello",
    "info",
    "latency",
    "ping",
    "psync",
    "replconf",
    "replicaof",
    "save",
    "script",
    "shutdown",
    "slaveof",
    "slowlog",
    "sync",
    "wait",
    "waitaof",
    "xread",
    "xreadgroup",
];

/// Of one process.
#[derive(Debug, Default)]
pub(super) struct Served {
    /// Whose rights it has had since the window began; 0: none.
    epoch: u64,
    began: Option<Instant>,
    number: u32,
    /// Calls and microseconds of each command when the window began.
    before: BTreeMap<String, (u64, u64)>,
    /// The newest first.
    windows: Vec<ServedWindow>,
}

impl Served {
    /// Whether the engine's counts are wanted now, of a primary with the rights of `epoch`; 0: it is none.
    fn is_due(&mut self, epoch: u64, now: Instant) -> bool {
        if epoch != self.epoch {
            *self = Self {
                epoch,
                ..Self::default()
            };
        }
        let is_over = |began: Instant| now.duration_since(began) >= WINDOW;
        epoch > 0 && self.began.is_none_or(is_over)
    }

    /// A window ends, and the next begins.
    fn read(&mut self, counts: &Info, now: Instant) {
        let after: BTreeMap<String, (u64, u64)> = counts
            .costs()
            .filter(|(name, ..)| is_counted(name))
            .map(|(name, calls, usec)| (name.to_owned(), (calls, usec)))
            .collect();
        if self.began.replace(now).is_some() {
            let commands = between(&self.before, &after);
            let window = ServedWindow {
                epoch: self.epoch,
                number: self.number,
                commands,
            };
            self.number = self.number.saturating_add(1);
            self.windows.insert(0, window);
            self.windows.truncate(WINDOWS);
        }
        self.before = after;
    }
}

fn is_counted(name: &str) -> bool {
    let command = name.split_once('|').map_or(name, |(command, _)| command);
    NOT_COUNTED.binary_search(&command).is_err()
}

/// The busiest commands of the time between two readings.
fn between(
    before: &BTreeMap<String, (u64, u64)>,
    after: &BTreeMap<String, (u64, u64)>,
) -> Vec<CommandCost> {
    let cost = |(name, (calls, usec)): (&String, &(u64, u64))| {
        let (calls_before, usec_before) = before.get(name).copied().unwrap_or_default();
        // Less than before: somebody has reset the counts.
        let calls = calls.checked_sub(calls_before).filter(|calls| *calls > 0)?;
        Some(CommandCost {
            name: name.clone(),
            calls,
            usec: usec.checked_sub(usec_before)?,
        })
    };
    let mut costs: Vec<CommandCost> = after.iter().filter_map(cost).collect();
    costs.sort_by_key(|cost| std::cmp::Reverse(cost.calls));
    costs.truncate(COMMANDS_MAX);
    costs
}

impl Worker {
    /// Of the rights that the process has as a primary; 0: it is none, or has none.
    pub(super) fn leading_epoch(&self) -> u64 {
        match self.report.observed_role() == NodeRole::Primary {
            true => self.report.granted_epoch,
            false => 0,
        }
    }

    /// Once in a window the engine is asked what it has counted; its last answer is reported.
    pub(super) async fn measure(&mut self) {
        let epoch = self.leading_epoch();
        if self.run.served.is_due(epoch, Instant::now())
            && let Some(control) = self.admin().await
            && let Ok(counts) = Info::read(control, "commandstats").await
        {
            self.run.served.read(&counts, Instant::now());
        }
        self.report.served.clone_from(&self.run.served.windows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(get: (u64, u64), blpop: u64) -> Info {
        Info::parse(&format!(
            "# Commandstats\r\ncmdstat_get:calls={},usec={},usec_per_call=1.00,rejected_calls=0,\
             failed_calls=0\r\ncmdstat_blpop:calls={blpop},usec=90000000,usec_per_call=1.00\r\n\
             cmdstat_config|get:calls=9,usec=9,usec_per_call=1.00\r\n",
            get.0, get.1
        ))
    }

    #[test]
    fn a_window_has_what_was_counted_in_it_and_two_are_kept() {
        let (mut served, now) = (Served::default(), Instant::now());
        for (turn, get) in [(5, 50), (8, 110), (18, 130), (30, 140)]
            .into_iter()
            .enumerate()
        {
            let now = now + WINDOW * u32::try_from(turn).unwrap();
            assert!(served.is_due(7, now) && !served.is_due(7, now - WINDOW / 2) || turn == 0);
            served.read(&counts(get, 3), now);
        }
        let windows = &served.windows;
        assert_eq!(windows.len(), WINDOWS);
        assert_eq!((windows[0].number, windows[1].number), (2, 1));
        let get = &windows[1].commands[0];
        assert_eq!(
            (get.name.as_str(), get.calls, get.usec, windows[1].epoch),
            ("get", 10, 20, 7)
        );
        assert_eq!(windows[1].commands.len(), 1, "nobody's waiting is counted");
    }

    #[test]
    fn another_epoch_begins_anew_and_without_rights_nothing_is_measured() {
        let (mut served, now) = (Served::default(), Instant::now());
        assert!(!served.is_due(0, now));
        for turn in 0..2 {
            assert!(served.is_due(7, now + WINDOW * turn));
            served.read(&counts((5, 5), 0), now + WINDOW * turn);
        }
        assert_eq!(served.windows.len(), 1);
        assert!(served.is_due(8, now + WINDOW));
        assert!(served.windows.is_empty(), "they were of epoch 7");
        assert!(!served.is_due(0, now + WINDOW * 9));
    }

    #[test]
    fn counts_that_were_reset_make_no_window_of_billions() {
        let (mut served, now) = (Served::default(), Instant::now());
        served.read(&counts((500, 5_000), 0), now);
        served.read(&counts((5, 50), 0), now + WINDOW);
        assert_eq!(served.windows[0].commands, []);
    }

    #[test]
    fn what_is_not_counted_can_be_found() {
        assert!(NOT_COUNTED.is_sorted());
        assert!(is_counted("get") && !is_counted("xread") && !is_counted("client|list"));
    }
}

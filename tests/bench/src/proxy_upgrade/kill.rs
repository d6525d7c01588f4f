//! `slotmesh-bench proxy-upgrade --kill N`: one of the two processes is killed at each moment of a
//! hand-over, N times each.
//!
//! Invariant: those who feed the clients, or look after them, are at another proxy, which nobody kills. So
//! who survives must hear everything once; and who does not was with the process that was killed.

mod moment;
mod report;

use std::{collections::BTreeMap, io::Write as _, time::Duration};

use anyhow::Context as _;
use slotmesh_ctl::up::process::is_alive;
use slotmesh_harness::wait_until;
use tokio::time::sleep;

pub(super) use self::report::Report;
use self::{
    moment::{Case, GIVEN, Moment, Side, TAKEN, Watched, Way, counted},
    report::Trial,
};
use super::{
    Args, FAILURES_MAX,
    book::{Books, Kind, Page},
    clients::{Crew, Plan},
    handover::{Bound, Proxy, clients, take_back},
    idle::Idle,
    wire::Wire,
};

/// For somebody to serve again: an agent that has to start a process looks a few times a second.
const SERVES_LIMIT: Duration = Duration::from_secs(60);
/// Load before a hand-over, and after a kill.
const QUIET: Duration = Duration::from_secs(1);
/// Of the clients, so many percent are to have gone when it is killed between batches, in turn.
const GONE_PERCENT: [u64; 3] = [10, 45, 80];

/// Flags of it.
#[derive(Debug, Clone, clap::Args)]
pub struct KillArgs {
    /// Kills one of the two processes at each moment of a hand-over, so many times each, instead of
    /// measuring hand-overs. The new one is started by hand.
    #[arg(long, value_name = "N", conflicts_with = "by", value_parser = clap::value_parser!(u32).range(1..))]
    pub kill: Option<u32>,
    /// Only there, or back; may be repeated.
    #[arg(long, value_enum, requires = "kill")]
    pub way: Vec<Way>,
    /// Only this process; may be repeated.
    #[arg(long, value_enum, requires = "kill")]
    pub side: Vec<Side>,
    /// Only this moment; may be repeated.
    #[arg(long, value_enum, requires = "kill")]
    pub moment: Vec<Moment>,
}

impl KillArgs {
    pub(super) fn is_wanted(&self) -> bool {
        self.kill.is_some()
    }

    /// All that are wanted, in their order.
    fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for way in [Way::There, Way::Back] {
            for moment in Moment::ALL {
                for side in [Side::Giver, Side::Taker] {
                    cases.push(Case { way, side, moment });
                }
            }
        }
        // A spare has been started long ago.
        cases.retain(|case| {
            let is_there = (case.way, case.moment) != (Way::Back, Moment::Start);
            is_there
                && (self.way.is_empty() || self.way.contains(&case.way))
                && (self.side.is_empty() || self.side.contains(&case.side))
                && (self.moment.is_empty() || self.moment.contains(&case.moment))
        });
        cases
    }
}

/// Measures all that is wanted.
///
/// # Errors
/// When clients could not be connected, or nobody serves at all any more.
pub(super) async fn measure(args: &Args, proxy: Proxy, others_at: &str) -> anyhow::Result<Report> {
    let mut run = Run {
        args,
        others_at: others_at.to_owned(),
        address: proxy.bound()?.address,
        proxy,
        known: BTreeMap::new(),
    };
    let mut report = Report::default();
    for number in 0..args.kill.kill.unwrap_or(0) {
        for case in args.kill.cases() {
            match run.trial(case, number).await {
                Ok(trial) => {
                    note(&trial);
                    report.trials.push(trial);
                }
                Err(error) => report.failed.push(format!("{case}: {error:#}")),
            }
            if report.failed.len() >= FAILURES_MAX as usize {
                return Ok(report);
            }
        }
    }
    Ok(report)
}

/// A long run says on stderr how it goes; nobody has to read it.
fn note(trial: &Trial) {
    let mut out = std::io::stderr().lock();
    let _ = writeln!(out, "{}", trial.line());
    let broken = trial.broken();
    let words = trial.words.iter().filter(|_| !broken.is_empty());
    for what in broken.iter().chain(words) {
        let _ = writeln!(out, "  ! {what}");
    }
}

struct Run<'a> {
    args: &'a Args,
    address: String,
    others_at: String,
    proxy: Proxy,
    /// Every process that has served, by its pid.
    known: BTreeMap<u32, Bound>,
}

/// A hand-over that has begun.
struct Begun {
    giver: Bound,
    taker: u32,
    given_before: u64,
    taken_before: u64,
    /// Where the answer comes of a spare that was asked.
    answer: Option<tokio::task::JoinHandle<anyhow::Result<()>>>,
}

impl Run<'_> {
    async fn trial(&mut self, case: Case, number: u32) -> anyhow::Result<Trial> {
        let giver = self.serving(None).await?;
        // Rows begin anew.
        let mut other = Wire::connect(&self.others_at).await?;
        other.expect("FLUSHALL", "+OK\r\n").await?;
        let books = Books::default();
        let total = u64::from(self.args.idle);
        let idle = Idle::connect(&self.address, total as usize, &books);
        let mut idle = idle.await.context("connect those that say nothing")?;
        let plan = Plan {
            address: self.address.clone(),
            others_at: self.others_at.clone(),
            active: self.args.active as usize,
            pace: Duration::from_millis(self.args.pace_ms),
            messages_per_second: self.args.messages,
        };
        let crew = Crew::start(&plan, &books).await?;
        sleep(QUIET).await;
        let begun = self.begin(case.way, giver).await?;
        let there = of_clients(&books.pages(), |page| page.connections);
        let watched = Watched {
            dir: self.proxy.dir().to_owned(),
            giver: begun.giver.clone(),
            taker: begun.taker,
            given_before: begun.given_before,
            gone: there * GONE_PERCENT[number as usize % GONE_PERCENT.len()] / 100,
            calm: Duration::from_millis(self.args.calm_ms),
        };
        let killed_us = watched.kill_at(case).await?;
        let killed = match case.side {
            Side::Giver => begun.giver.pid,
            Side::Taker => begun.taker,
        };
        let serving = self.serving(Some(killed)).await?;
        sleep(QUIET).await;
        let (went, strays) = self.count(case.side, &begun, &serving).await?;
        if let Some(answer) = begun.answer {
            answer.abort();
        }
        idle.look();
        crew.end().await;
        idle.end().await;
        let (pages, taker_serves) = (books.pages(), serving.pid == begun.taker);
        Ok(Trial::of(
            case,
            &pages,
            killed_us,
            went,
            strays,
            taker_serves,
        ))
    }

    /// Lets the hand-over begin, after one there if it is the way back that is wanted.
    async fn begin(&mut self, way: Way, mut giver: Bound) -> anyhow::Result<Begun> {
        let (mut taken_before, mut spare) = (0, None);
        if way == Way::Back {
            self.proxy.hand_over().await.context("hand over first")?;
            let before = std::mem::replace(&mut giver, self.serving(None).await?);
            taken_before = counted(&before.admin_address, TAKEN).await?;
            spare = Some(before);
            sleep(QUIET).await;
        }
        let given_before = counted(&giver.admin_address, GIVEN).await?;
        let (taker, answer) = match spare {
            Some(spare) => (spare.pid, Some(tokio::spawn(take_back(spare.handover)))),
            None => (self.proxy.begin(&giver)?, None),
        };
        Ok(Begun {
            giver,
            taker,
            given_before,
            taken_before,
            answer,
        })
    }

    /// The process that serves new clients, once there is one that is not this.
    async fn serving(&mut self, killed: Option<u32>) -> anyhow::Result<Bound> {
        let serving = wait_until(SERVES_LIMIT, "somebody to serve", async || {
            let bound = self.proxy.bound()?;
            let is_other = Some(bound.pid) != killed && is_alive(bound.pid);
            anyhow::ensure!(is_other, "{bound:?}: {}", self.proxy.last_words());
            let mut wire = Wire::connect(&bound.address).await?;
            wire.expect("SET pu:any 1", "+OK\r\n").await?;
            Ok(bound)
        });
        let serving = serving.await?;
        self.known.insert(serving.pid, serving.clone());
        Ok(serving)
    }

    /// How many clients went from the giver to the taker, by the count of whoever of them lives, and how
    /// many are with a process that is not the one that serves.
    async fn count(
        &mut self,
        killed: Side,
        begun: &Begun,
        serving: &Bound,
    ) -> anyhow::Result<(u64, u64)> {
        let went = match killed {
            Side::Taker => {
                let given = counted(&begun.giver.admin_address, GIVEN).await?;
                given - begun.given_before
            }
            Side::Giver if serving.pid == begun.taker => {
                counted(&serving.admin_address, TAKEN).await? - begun.taken_before
            }
            Side::Giver => 0,
        };
        self.known.retain(|pid, _| is_alive(*pid));
        let mut strays = 0;
        for other in self.known.values().filter(|one| one.pid != serving.pid) {
            // It may end in this moment.
            strays += clients(&other.admin_address).await.unwrap_or(0);
        }
        Ok((went, strays))
    }
}

/// Of all connections that are with the process that is killed, or the other one.
fn of_clients(pages: &BTreeMap<Kind, Page>, what: impl Fn(&Page) -> u64) -> u64 {
    let own = pages
        .iter()
        .filter(|(kind, _)| !matches!(kind, Kind::Plain | Kind::New));
    own.map(|(_, page)| what(page)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_process_is_killed_at_every_moment_unless_some_are_named() {
        let all = KillArgs {
            kill: Some(1),
            way: Vec::new(),
            side: Vec::new(),
            moment: Vec::new(),
        };
        assert_eq!(all.cases().len(), 2 * (7 + 6));
        let some = KillArgs {
            side: vec![Side::Taker],
            moment: vec![Moment::Start, Moment::Last],
            ..all
        };
        assert_eq!(some.cases().len(), 3);
    }
}

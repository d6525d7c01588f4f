//! Which of one process's lines are writes of proxies, and of which epoch: by the user of the
//! connection that they came from.
//!
//! Invariant: a connection's user is taken from a CLIENT LIST that was asked for after the connection
//! was first heard of (or logged in again), so it is never that of an earlier connection of the same
//! address. A write whose connection was gone before it could be asked for is counted as unplaced.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::{
    epochs::{Moment, Span},
    line::Line,
};

/// Users of proxies are called so, with their epoch behind it.
const PROXY_USER: &str = "px-";
/// Lines that are kept, for whoever looks into a failure.
const EVIDENCE_LINES: usize = 400;
/// Of each of them.
const EVIDENCE_LINE_MAX: usize = 200;
/// Stamps are taken before they are heard of; more than this ahead, the process has another clock.
const AHEAD_MAX_US: u64 = 50_000;
/// No fault lets a process stand still for longer; further behind, it has another clock.
const BEHIND_MAX_US: u64 = 60_000_000;
/// A node is asked by its agent ten times a second: one that says nothing for so long stood still.
const STILL_US: u64 = 1_000_000;
/// What waited in its sockets meanwhile it executes on waking, before anybody can fence it. It was on
/// its way since before, so that is not held against the process for so long.
const WAKING_US: u64 = 500_000;
/// Between the execution of a command and its line's way into our buffer, when it is not frozen.
const FLUSH_US: u64 = 1_000_000;

/// When a line was read, and when the one before.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    /// The line before it was read then.
    pub since_us: u64,
    /// It was read then.
    pub at_us: u64,
    /// Wall clock less monotonic clock.
    pub wall_ahead_us: u64,
}

impl Heard {
    /// When a command with this stamp was executed, and whether the stamp could be used.
    fn moment(self, wall_us: u64) -> (Moment, bool) {
        let stamp = wall_us.saturating_sub(self.wall_ahead_us);
        let fits = stamp <= self.at_us + AHEAD_MAX_US && stamp + BEHIND_MAX_US >= self.at_us;
        if fits {
            return (Moment::at(stamp.min(self.at_us)), true);
        }
        let rough = Moment {
            lo_us: self.since_us.saturating_sub(FLUSH_US),
            hi_us: self.at_us,
        };
        (rough, false)
    }
}

#[derive(Debug)]
enum Whose {
    /// Asked for by the CLIENT LIST of this number or a later one; what it wrote so far.
    Unknown(u64, Option<Span>),
    Proxy(u64),
    Other,
}

/// What one process accepted.
#[derive(Debug, Default)]
pub struct Accepted {
    /// Per proxy's address and epoch.
    pub spans: BTreeMap<(String, u64), Span>,
    /// Writes of connections that were gone before their user was known.
    pub unplaced: u64,
    /// Writes whose stamp was of another clock: placed by the reader's, roughly.
    pub rough: u64,
    /// Writes of a process that had just woken up.
    pub woken: u64,
    /// Lines of any kind.
    pub lines: u64,
    /// The last of them.
    pub evidence: VecDeque<String>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Tracker {
    connections: HashMap<String, Whose>,
    /// Number of the last CLIENT LIST that was asked for.
    asked: u64,
    /// The last line's stamp.
    stamp_us: Option<u64>,
    /// It stood still from then to then.
    still: Option<(u64, u64)>,
    accepted: Accepted,
}

impl Tracker {
    /// A line that was heard.
    pub fn line(&mut self, text: &str, heard: Heard) {
        let Some(line) = Line::parse(text) else {
            return;
        };
        self.accepted.lines += 1;
        let (mut moment, fits) = heard.moment(line.wall_us);
        let waking = fits && self.is_waking(moment.lo_us);
        let Some(host) = line.host() else {
            return;
        };
        self.remember(text);
        let next = self.asked + 1;
        if line.is_login() {
            let before = self.connections.remove(line.client);
            self.leave(before);
            self.connections
                .insert(line.client.to_owned(), Whose::Unknown(next, None));
            return;
        }
        let whose = match self.connections.get_mut(line.client) {
            Some(whose) => whose,
            None => self
                .connections
                .entry(line.client.to_owned())
                .or_insert(Whose::Unknown(next, None)),
        };
        if !line.is_write() || matches!(whose, Whose::Other) {
            return;
        }
        if let (true, Some((before_us, _))) = (waking, self.still) {
            moment.lo_us = before_us;
            self.accepted.woken += 1;
        }
        match whose {
            Whose::Unknown(_, Some(span)) => span.add(moment, text),
            Whose::Unknown(_, none) => *none = Some(Span::of(moment, text)),
            Whose::Proxy(epoch) => {
                let key = (host.to_owned(), *epoch);
                match self.accepted.spans.get_mut(&key) {
                    Some(span) => span.add(moment, text),
                    None => drop(self.accepted.spans.insert(key, Span::of(moment, text))),
                }
            }
            Whose::Other => {}
        }
        self.accepted.rough += u64::from(!fits);
    }

    /// Whether the process stood still until just before.
    fn is_waking(&mut self, stamp_us: u64) -> bool {
        if let Some(last_us) = self.stamp_us.replace(stamp_us)
            && stamp_us > last_us + STILL_US
        {
            self.still = Some((last_us, stamp_us));
        }
        let still = self.still;
        still.is_some_and(|(_, woke_us)| stamp_us <= woke_us + WAKING_US)
    }

    fn remember(&mut self, text: &str) {
        let evidence = &mut self.accepted.evidence;
        if evidence.len() >= EVIDENCE_LINES {
            evidence.pop_front();
        }
        let kept: String = text.chars().take(EVIDENCE_LINE_MAX).collect();
        evidence.push_back(kept);
    }

    fn leave(&mut self, whose: Option<Whose>) {
        if let Some(Whose::Unknown(_, Some(span))) = whose {
            self.accepted.unplaced += span.count;
        }
    }

    /// Whether some connection's user is not known.
    #[must_use]
    pub fn is_curious(&self) -> bool {
        let mut all = self.connections.values();
        all.any(|whose| matches!(whose, Whose::Unknown(..)))
    }

    /// A CLIENT LIST is sent now: its number.
    pub fn ask(&mut self) -> u64 {
        self.asked += 1;
        self.asked
    }

    /// The users by connection, as CLIENT LIST number `asked` showed them.
    pub fn listed(&mut self, asked: u64, users: &HashMap<String, String>) {
        let mut kept = HashMap::new();
        for (client, whose) in std::mem::take(&mut self.connections) {
            let whose = match whose {
                Whose::Unknown(since, span) if since <= asked => match users.get(&client) {
                    Some(user) => self.place(&client, user, span),
                    None => {
                        self.leave(Some(Whose::Unknown(since, span)));
                        continue;
                    }
                },
                // It is gone; should its address come back, that is another connection.
                Whose::Proxy(_) | Whose::Other if !users.contains_key(&client) => continue,
                other => other,
            };
            kept.insert(client, whose);
        }
        self.connections = kept;
    }

    fn place(&mut self, client: &str, user: &str, span: Option<Span>) -> Whose {
        let epoch = user.strip_prefix(PROXY_USER).and_then(|e| e.parse().ok());
        let Some(epoch) = epoch else {
            return Whose::Other;
        };
        let host = client.rsplit_once(':').map_or(client, |(host, _)| host);
        if let Some(span) = span {
            match self.accepted.spans.get_mut(&(host.to_owned(), epoch)) {
                Some(known) => known.join(span),
                None => drop(self.accepted.spans.insert((host.to_owned(), epoch), span)),
            }
        }
        Whose::Proxy(epoch)
    }

    /// The process is gone, or the run is over.
    #[must_use]
    pub fn end(mut self) -> Accepted {
        for (_, whose) in std::mem::take(&mut self.connections) {
            self.leave(Some(whose));
        }
        self.accepted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AHEAD: u64 = 1_000_000_000_000;

    fn heard(at_us: u64) -> Heard {
        Heard {
            since_us: at_us.saturating_sub(10),
            at_us,
            wall_ahead_us: AHEAD,
        }
    }

    fn say(tracker: &mut Tracker, us: u64, client: &str, command: &str) {
        let wall = AHEAD + us;
        let (seconds, micros) = (wall / 1_000_000, wall % 1_000_000);
        let line = format!("+{seconds}.{micros:06} [0 {client}] \"{command}\" \"k\"");
        tracker.line(&line, heard(us + 5));
    }

    fn users(all: &[(&str, &str)]) -> HashMap<String, String> {
        let pair = |(c, u): &(&str, &str)| ((*c).to_owned(), (*u).to_owned());
        all.iter().map(pair).collect()
    }

    #[test]
    fn writes_count_at_the_epoch_of_their_connections_user() {
        let mut tracker = Tracker::default();
        say(&mut tracker, 100, "1.1.1.1:40000", "RPUSH");
        say(&mut tracker, 110, "2.2.2.2:25000", "RPUSH");
        say(&mut tracker, 120, "lua", "RPUSH");
        assert!(tracker.is_curious());
        let asked = tracker.ask();
        tracker.listed(
            asked,
            &users(&[("1.1.1.1:40000", "px-7"), ("2.2.2.2:25000", "(superuser)")]),
        );
        assert!(!tracker.is_curious());
        say(&mut tracker, 130, "1.1.1.1:40000", "GET");
        say(&mut tracker, 140, "1.1.1.1:40000", "EVAL");
        say(&mut tracker, 150, "2.2.2.2:25000", "RPUSH");
        let accepted = tracker.end();
        assert_eq!(accepted.spans.len(), 1);
        let span = &accepted.spans[&("1.1.1.1".to_owned(), 7)];
        let seen = (span.first.lo_us, span.last.hi_us, span.count);
        assert_eq!(seen, (100, 140, 2));
        assert_eq!((accepted.unplaced, accepted.lines), (0, 6));
    }

    #[test]
    fn a_connection_that_logs_in_again_is_asked_for_again() {
        let mut tracker = Tracker::default();
        say(&mut tracker, 100, "1.1.1.1:40000", "RPUSH");
        let early = tracker.ask();
        say(&mut tracker, 110, "1.1.1.1:40000", "AUTH");
        say(&mut tracker, 120, "1.1.1.1:40000", "RPUSH");
        // It shows the user from before, perhaps.
        tracker.listed(early, &users(&[("1.1.1.1:40000", "px-1")]));
        let late = tracker.ask();
        tracker.listed(late, &users(&[("1.1.1.1:40000", "px-2")]));
        let accepted = tracker.end();
        let epochs: Vec<u64> = accepted.spans.keys().map(|(_, e)| *e).collect();
        assert_eq!((epochs, accepted.unplaced), (vec![2], 1));
    }

    #[test]
    fn a_connection_that_is_gone_and_its_successor_are_two() {
        let mut tracker = Tracker::default();
        say(&mut tracker, 100, "1.1.1.1:40000", "SET");
        let gone = tracker.ask();
        tracker.listed(gone, &users(&[]));
        say(&mut tracker, 110, "1.1.1.1:40000", "SET");
        let here = tracker.ask();
        tracker.listed(here, &users(&[("1.1.1.1:40000", "px-3")]));
        let accepted = tracker.end();
        assert_eq!(accepted.unplaced, 1);
        assert_eq!(accepted.spans[&("1.1.1.1".to_owned(), 3)].count, 1);
    }

    #[test]
    fn a_stamp_of_another_clock_is_replaced_by_when_it_was_heard() {
        let at = 7_200_000_000;
        for stamp in [at + 3_600_000_000, at - 3_600_000_000] {
            let (moment, fits) = heard(at).moment(AHEAD + stamp);
            assert!(!fits);
            assert_eq!(moment.hi_us, at);
            assert_eq!(moment.lo_us, at - 10 - FLUSH_US);
        }
        // A process that stood still for ten seconds has its own clock all the same.
        let (moment, fits) = heard(at).moment(AHEAD + at - 10_000_000);
        assert_eq!((moment, fits), (Moment::at(at - 10_000_000), true));
    }

    #[test]
    fn what_waited_while_a_process_stood_still_counts_as_of_before() {
        let mut tracker = Tracker::default();
        let client = "1.1.1.1:40000";
        say(&mut tracker, 100, client, "SET");
        let asked = tracker.ask();
        tracker.listed(asked, &users(&[(client, "px-1")]));
        let woke = 100 + STILL_US + 1;
        say(&mut tracker, woke, "unix:/admin.sock", "INFO");
        say(&mut tracker, woke + 10, client, "SET");
        let still = tracker.accepted.spans[&("1.1.1.1".to_owned(), 1)].last;
        assert_eq!(still.lo_us, 100);
        // From then on it should have been fenced.
        say(&mut tracker, woke + STILL_US, client, "SET");
        let accepted = tracker.end();
        let last = accepted.spans[&("1.1.1.1".to_owned(), 1)].last;
        assert_eq!((last.lo_us, accepted.woken), (woke + STILL_US, 1));
    }

    #[test]
    fn evidence_is_bounded() {
        let mut tracker = Tracker::default();
        for n in 0..2_000 {
            say(&mut tracker, n, "1.1.1.1:40000", "GET");
        }
        assert_eq!(tracker.end().evidence.len(), EVIDENCE_LINES);
    }
}

//! When writes of which epoch were accepted, and by which process: only the first and the last of each.
//!
//! Invariant: an answer does not depend on the order in which lines are heard. A process that stood
//! still hands its lines over late, and still each counts at the time at which it was executed.

use std::collections::BTreeMap;

use crate::chaos::check::Finding;

/// Of a line that is kept as evidence.
const LINE_MAX: usize = 160;

/// When something happened: not before, and not after.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moment {
    /// Not before, in microseconds of the machine's monotonic clock.
    pub lo_us: u64,
    /// Not after.
    pub hi_us: u64,
}

impl Moment {
    /// Known exactly.
    #[must_use]
    pub fn at(us: u64) -> Self {
        Self {
            lo_us: us,
            hi_us: us,
        }
    }
}

/// The first and the last of some writes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Span {
    /// It had happened by its `hi_us`.
    pub first: Moment,
    /// It had not happened before its `lo_us`.
    pub last: Moment,
    /// How many there were.
    pub count: u64,
    /// As they were heard.
    pub first_line: String,
    /// As it was heard.
    pub last_line: String,
}

impl Span {
    /// Of one write.
    #[must_use]
    pub fn of(moment: Moment, line: &str) -> Self {
        Self {
            first: moment,
            last: moment,
            count: 1,
            first_line: cut(line).to_owned(),
            last_line: cut(line).to_owned(),
        }
    }

    /// One write more.
    pub fn add(&mut self, moment: Moment, line: &str) {
        self.count += 1;
        if moment.hi_us < self.first.hi_us {
            self.first = moment;
            cut(line).clone_into(&mut self.first_line);
        }
        if moment.lo_us >= self.last.lo_us {
            self.last = moment;
            cut(line).clone_into(&mut self.last_line);
        }
    }

    /// Those of another span, too.
    pub fn join(&mut self, other: Self) {
        self.count += other.count;
        if other.first.hi_us < self.first.hi_us {
            self.first = other.first;
            self.first_line = other.first_line;
        }
        if other.last.lo_us > self.last.lo_us {
            self.last = other.last;
            self.last_line = other.last_line;
        }
    }
}

fn cut(line: &str) -> &str {
    let mut end = line.len().min(LINE_MAX);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    &line[..end]
}

/// Per shard (or per whatever must follow epochs), epoch and process: first and last write.
#[derive(Clone, Debug, Default)]
pub struct Epochs {
    shards: BTreeMap<String, BTreeMap<u64, BTreeMap<String, Span>>>,
}

impl Epochs {
    /// Takes what one process accepted at one epoch.
    pub fn note(&mut self, shard: &str, epoch: u64, process: &str, span: Span) {
        let processes = self
            .shards
            .entry(shard.to_owned())
            .or_default()
            .entry(epoch)
            .or_default();
        match processes.get_mut(process) {
            Some(known) => known.join(span),
            None => drop(processes.insert(process.to_owned(), span)),
        }
    }

    /// All writes.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.spans().map(|(_, _, _, span)| span.count).sum()
    }

    /// Shards and epochs in which there were writes.
    #[must_use]
    pub fn epochs(&self) -> usize {
        self.shards.values().map(BTreeMap::len).sum()
    }

    /// Every span, with its shard, epoch and process.
    pub fn spans(&self) -> impl Iterator<Item = (&str, u64, &str, &Span)> {
        self.shards.iter().flat_map(|(shard, epochs)| {
            epochs.iter().flat_map(move |(epoch, processes)| {
                let of = processes.iter();
                of.map(move |(process, span)| (shard.as_str(), *epoch, process.as_str(), span))
            })
        })
    }

    /// The highest epoch of each shard.
    pub fn newest(&self) -> impl Iterator<Item = (&str, u64)> {
        let last = |epochs: &BTreeMap<u64, _>| epochs.keys().next_back().copied();
        let of = self.shards.iter();
        of.filter_map(move |(shard, epochs)| Some((shard.as_str(), last(epochs)?)))
    }

    /// Once a write of an epoch was accepted, none of a lower epoch is; and at one epoch one process
    /// accepts writes at a time (the same node may be started again without a new epoch).
    #[must_use]
    pub fn judge(&self, check: &'static str) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (shard, epochs) in &self.shards {
            // The latest write of all lower epochs.
            let mut before: Option<(u64, &str, &Span)> = None;
            for (epoch, processes) in epochs {
                let mut spans: Vec<(&str, &Span)> =
                    processes.iter().map(|(p, s)| (p.as_str(), s)).collect();
                spans.sort_by_key(|(_, span)| span.first.hi_us);
                if let (Some(old), Some(new)) = (before, spans.first())
                    && old.2.last.lo_us > new.1.first.hi_us
                {
                    findings.push(overlap(check, shard, old, (*epoch, new.0, new.1)));
                }
                for pair in spans.windows(2) {
                    let (one, other) = (pair[0], pair[1]);
                    if one.1.last.lo_us > other.1.first.hi_us {
                        let (one, other) = ((*epoch, one.0, one.1), (*epoch, other.0, other.1));
                        findings.push(overlap(check, shard, one, other));
                    }
                }
                let last = spans.iter().max_by_key(|(_, span)| span.last.lo_us);
                if let Some((process, span)) = last
                    && before.is_none_or(|(_, _, b)| b.last.lo_us < span.last.lo_us)
                {
                    before = Some((*epoch, process, span));
                }
            }
        }
        findings
    }
}

fn overlap(
    check: &'static str,
    shard: &str,
    old: (u64, &str, &Span),
    new: (u64, &str, &Span),
) -> Finding {
    Finding {
        check,
        broken: true,
        what: format!(
            "{shard}: {} us after {} had accepted {:?} at epoch {}, {} accepted {:?} at epoch {}",
            old.2.last.lo_us - new.2.first.hi_us,
            new.1,
            new.2.first_line,
            new.0,
            old.1,
            old.2.last_line,
            old.0,
        ),
        count: 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHECK: &str = "C5 two writers";

    fn span(first: u64, last: u64) -> Span {
        let mut span = Span::of(Moment::at(first), "first");
        span.add(Moment::at(last), "last");
        span
    }

    fn broken(spans: &[(u64, &str, Span)]) -> usize {
        let mut epochs = Epochs::default();
        for (epoch, process, span) in spans {
            epochs.note("s", *epoch, process, span.clone());
        }
        let found = epochs.judge(CHECK);
        assert!(found.iter().all(|f| f.broken && f.check == CHECK));
        found.len()
    }

    #[test]
    fn epochs_that_follow_one_another_are_fine_in_whatever_order_they_are_heard() {
        let fine = [
            (3, "c", span(50, 60)),
            (1, "a", span(10, 20)),
            (2, "b", span(30, 40)),
            (5, "a", span(61, 70)),
        ];
        assert_eq!(broken(&fine), 0);
    }

    #[test]
    fn a_write_of_an_old_epoch_after_one_of_a_newer_is_found() {
        let two = [(1, "a", span(10, 35)), (2, "b", span(30, 40))];
        assert_eq!(broken(&two), 1);
        // Also when an epoch without an overlap is between them.
        let late = [
            (1, "a", span(10, 55)),
            (2, "b", span(56, 57)),
            (3, "c", span(50, 60)),
        ];
        assert_eq!(broken(&late), 1);
    }

    #[test]
    fn two_processes_at_one_epoch_may_follow_one_another_but_not_both_write() {
        let again = [(1, "a", span(10, 20)), (1, "b", span(30, 40))];
        assert_eq!(broken(&again), 0);
        let both = [(1, "a", span(10, 31)), (1, "b", span(30, 40))];
        assert_eq!(broken(&both), 1);
    }

    #[test]
    fn what_is_known_only_roughly_is_held_against_nobody() {
        let rough = Moment {
            lo_us: 20,
            hi_us: 90,
        };
        let mut old = span(10, 15);
        old.add(rough, "some time");
        assert_eq!(broken(&[(1, "a", old), (2, "b", span(30, 40))]), 0);
    }
}
